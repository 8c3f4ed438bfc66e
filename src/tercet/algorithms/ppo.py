"""Reinforcement learning with a critic: answers are scored, and every token learns what it contributed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tercet.algorithms.policy_gradient import SEEDS_PER_RUN, synchronised
from tercet.algorithms.ppo_step import PPO, PPOStepConfig
from tercet.algorithms.rollout_metrics import length_metrics, reward_metrics, sample_rows, times
from tercet.algorithms.rollouts import RolloutConfig, answer, candidates
from tercet.algorithms.steps import rows_of_step
from tercet.chat.renderers import Renderer
from tercet.engine.base import Sampler
from tercet.errors import ConfigError
from tercet.rewards.combined import WeightedSum
from tercet.rewards.scaling import MissingEnd, Moments, ScoreScaling, scaled, with_missing_ends
from tercet.runs.run import Run
from tercet.types import Conversation

Columns = Mapping[Conversation, Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PPOStepConfig, RolloutConfig):
    """The third stage with a scalar reward and a critic."""

    steps: int = 40
    """Rounds of sampling and learning."""
    prompts_per_step: int = 32
    """Prompts answered per step."""
    group_size: int = 1
    """Answers per prompt; a tournament needs at least 2."""
    missing_end: MissingEnd = "penalise"
    """What an answer that does not end with its stop costs: none; penalise takes missing_end_value off its score;
    replace puts missing_end_value in its place."""
    missing_end_value: float = 1.0
    """See missing_end; -1 is usual with replace."""
    score_scaling: ScoreScaling = "none"
    """Divide scores by the standard deviation of all so far (std), after their mean is taken off (mean_std)."""
    score_clip: float | None = None
    """Bound of the scores, at minus and plus this; null has none."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 10
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.completions_per_step % self.mini_batch_size:
            raise ConfigError(
                f"{self.prompts_per_step} prompts x {self.group_size} answers are {self.completions_per_step} a step, "
                f"which must be a multiple of mini_batch_size, {self.mini_batch_size}"
            )


def ppo(
    config: PPOConfig,
    prompts: Sequence[Conversation],
    renderer: Renderer,
    reward: WeightedSum,
    learner: PPO,
    *,
    run: Run,
    evaluate: Callable[[Sampler, int], Mapping[str, float]],
    seed: int,
    columns: Columns | None = None,
) -> None:
    """Sample, score, learn, from wherever the run stands.

    Args:
        config: How.
        prompts: What is answered.
        renderer: Conversations to tokens and back.
        reward: Scores the answers.
        learner: Policy, critic and reference.
        run: Where it is written down; its total steps are `config.steps`.
        evaluate: Measures a policy after so many steps.
        seed: Of the order and of every sample.
        columns: What the data say of prompts, for rewards that ask.
    """
    start = run.start()
    if run.is_done:
        return
    moments = Moments()
    if start.weights is not None:
        learner.restore(start.weights, start.state)
        moments = Moments(**start.state["moments"])
    for step in range(start.step, config.steps):
        clock = [time.monotonic()]
        sampler = synchronised(learner.policy)
        measured = evaluate(sampler, step) if config.eval_every_steps and step % config.eval_every_steps == 0 else {}
        clock.append(time.monotonic())
        chosen = rows_of_step(prompts, step, config.prompts_per_step, seed=seed)
        groups = answer(
            chosen, sampler, renderer, config.sampling(renderer, seed * SEEDS_PER_RUN + step), config.group_size
        )
        answers = [each for group in groups for each in group]
        clock.append(time.monotonic())
        rewards = reward.group_rewards(candidates(groups, columns))
        raw = [score for group in rewards for score in group]
        ended = [each.termination == "stop" for each in answers]
        whole = with_missing_ends(raw, ended, how=config.missing_end, value=config.missing_end_value)
        moments = moments.with_batch(whole)
        scores = scaled(whole, moments, how=config.score_scaling, clip=config.score_clip)
        clock.append(time.monotonic())
        learned = learner.learn(
            [each.prompt_tokens for each in answers], [each.completion.tokens for each in answers], scores
        )
        clock.append(time.monotonic())
        flat = iter(scores)
        learned_from = [[next(flat) for _ in group] for group in groups]
        run.samples(step, sample_rows(groups, rewards, learned_from, "score"))
        run.log(step, {**reward_metrics(groups, rewards), **learned, **measured, **length_metrics(answers),
                       "format": sum(ended) / len(ended),
                       **times(clock, "eval", "sample", "score", "train")})  # fmt: skip
        if run.save_is_due(step + 1):
            run.save(learner, next_step=step + 1, state=state(learner, moments))
    run.log(config.steps, evaluate(learner.policy.sampler(), config.steps))
    run.finish(learner, state=state(learner, moments))


def state(learner: PPO, moments: Moments) -> dict[str, object]:
    """What a checkpoint holds beside the weights."""
    seen = {"count": moments.count, "mean": moments.mean, "variance": moments.variance}
    return {**learner.state, "moments": seen}
