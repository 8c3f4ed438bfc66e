"""Reinforcement learning from a tournament: answers to one prompt meet, a judge decides, winners become likelier."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from tercet.algorithms.advantages import Scale, advantages
from tercet.algorithms.importance import as_drawn, corrected, weighted
from tercet.algorithms.rollout_metrics import (
    kl_metrics,
    length_metrics,
    reward_metrics,
    sample_rows,
    sampler_metrics,
    times,
)
from tercet.algorithms.rollouts import Answer, RolloutConfig, answer, log_ratios, tournament_rewards
from tercet.algorithms.steps import learn_and_step, rows_of_step
from tercet.chat.renderers import Renderer
from tercet.engine.base import LOGPROB_TOLERANCE, Sampler, Trainer
from tercet.errors import ConfigError, TrainingError
from tercet.rewards.judge import Compares, Verdict
from tercet.rewards.tournament import Pattern, matches
from tercet.runs.run import Run
from tercet.types import Batch, Conversation

# A run samples step after step with seeds of its own; the next run's begin beyond them.
SEEDS_PER_RUN = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RLConfig(RolloutConfig):
    """The third stage."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls."""
    steps: int = 16
    """Rounds of sampling and learning."""
    group_size: int = 4
    """Answers per prompt; they meet each other."""
    pattern: Pattern = "both_ways"
    """Which matches are played: both_ways (every ordered pair) or one_way (each pair once)."""
    chunk: int | None = None
    """Answers meet only within chunks of this size; null lets the whole group meet."""
    judge: Verdict = "soft"
    """soft reads label probabilities in one pass; hard takes greedy letters, as the published recipe does."""
    format_penalty: float = 1.0
    """Taken off the reward of an answer that does not end with its stop."""
    scale: Scale = "none"
    """What is made of reward minus group mean: none, std (GRPO), rloo, batch."""
    loss: Literal["importance_sampling", "ppo", "cispo"] = "importance_sampling"
    """The policy-gradient loss."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference (the SFT policy), taken off the reward of each answer."""
    importance_cap: float = 3.0
    """Where another program draws the answers (sampler vllm), each counts as often as the trainer finds it likelier;
    above this, not at all."""
    substeps: int = 1
    """Optimizer steps per round; the groups are dealt out among them."""
    eval_every_steps: int = 8
    """Steps between win-rate evaluations; 0 evaluates only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_cap < 1:
            raise ConfigError(f"importance_cap is {self.importance_cap}; it must be at least 1 (3 is usual)")
        matches(self.group_size, pattern=self.pattern, chunk=self.chunk)
        if not 1 <= self.substeps <= self.prompts_per_step:
            raise ConfigError(
                f"substeps is {self.substeps}; it must be from 1 to prompts_per_step, which is {self.prompts_per_step}"
            )


def policy_gradient(
    config: RLConfig,
    prompts: Sequence[Conversation],
    renderer: Renderer,
    judge: Compares,
    reference: Sampler,
    *,
    trainer: Trainer,
    run: Run,
    evaluate: Callable[[Sampler, int], Mapping[str, float]],
    seed: int,
    foreign_sampler: bool = False,
) -> None:
    """Sample, judge, learn, from wherever the run stands.

    Args:
        config: How.
        prompts: What is answered.
        renderer: Conversations to tokens and back.
        judge: Decides the matches.
        reference: The policy at the start, for the KL.
        trainer: What learns.
        run: Where it is written down; its total steps are `config.steps`.
        evaluate: Measures a policy after so many steps.
        seed: Of the order and of every sample.
        foreign_sampler: Whether another program draws than the one that trains, so that their log-probs differ.
    """
    start = run.start()
    if run.is_done:
        return
    if start.weights is not None:
        trainer.load(start.weights).result()
    for step in range(start.step, config.steps):
        clock = [time.monotonic()]
        sampler = synchronised(trainer)
        measured = evaluate(sampler, step) if config.eval_every_steps and step % config.eval_every_steps == 0 else {}
        clock.append(time.monotonic())
        chosen = rows_of_step(prompts, step, config.prompts_per_step, seed=seed)
        groups = answer(
            chosen, sampler, renderer, config.sampling(renderer, seed * SEEDS_PER_RUN + step), config.group_size
        )
        groups, weights, seen = (
            corrected(groups, trainer, temperature=config.temperature, cap=config.importance_cap)
            if foreign_sampler
            else as_drawn(groups)
        )
        clock.append(time.monotonic())
        rewards, judged = tournament_rewards(
            groups, judge, pattern=config.pattern, chunk=config.chunk, format_penalty=config.format_penalty
        )
        kl = log_ratios(groups, reference, config.temperature)
        penalised = [
            [r - config.kl_coef * sum(d) for r, d in zip(*pair, strict=True)] for pair in zip(rewards, kl, strict=True)
        ]
        advantage = weighted(advantages(penalised, scale=config.scale), weights)
        clock.append(time.monotonic())
        learned = {**learn_groups(config, groups, advantage, step, trainer=trainer, run=run), **seen}
        clock.append(time.monotonic())
        checked = self_check(learned, kl) if step == 0 else {}
        run.samples(step, sample_rows(groups, penalised, advantage))
        run.log(step, {**reward_metrics(groups, penalised), **judged, **kl_metrics(kl), **learned, **measured,
                       **checked, **length_metrics([each for group in groups for each in group]),
                       **times(clock, "eval", "sample", "judge", "train")})  # fmt: skip
        if run.save_is_due(step + 1):
            run.save(trainer, next_step=step + 1)
    run.log(config.steps, evaluate(trainer.sampler(), config.steps))
    run.finish(trainer)


@runtime_checkable
class ReadsWeights(Protocol):
    """A trainer that can tell without a hash whether a sampler holds its weights."""

    def is_held_by(self, sampler: Sampler) -> bool:
        """Whether it does, to the bit."""
        ...


def synchronised(trainer: Trainer) -> Sampler:
    """The sampler of the newest weights.

    Raises:
        TrainingError: It does not hold the trainer's weights.
    """
    sampler = trainer.sampler()
    if isinstance(trainer, ReadsWeights) and trainer.is_held_by(sampler):
        return sampler
    ours, theirs = trainer.fingerprint(), sampler.fingerprint()
    if ours != theirs:
        raise TrainingError(f"the sampler holds weights {theirs[:12]}, the trainer {ours[:12]}; they must be the same")
    return sampler


def learn_groups(
    config: RLConfig,
    groups: Sequence[Sequence[Answer]],
    advantage: Sequence[Sequence[float]],
    step: int,
    *,
    trainer: Trainer,
    run: Run,
) -> dict[str, float]:
    """Deal the groups out among the substeps and take an optimizer step on each deal."""
    rows: list[dict[str, float]] = []
    gaps: dict[str, float] = {}
    for part in range(config.substeps):
        pairs = [
            (each, a)
            for g in range(part, len(groups), config.substeps)
            for each, a in zip(groups[g], advantage[g], strict=True)
        ]
        data = [each.datum(sampling_logprobs=each.completion.logprobs, advantages=a) for each, a in pairs]
        adam = config.adam(step, config.steps)
        result, optim = learn_and_step(trainer, Batch(data), config.loss, adam, run, temperature=config.temperature)
        learned = {"loss": result.loss, "grad_norm": optim.grad_norm, "learning_rate": optim.learning_rate}
        rows.append({**result.metrics, **learned})
        # Before any step is taken, what trainer and sampler disagree on is numerics; after that it is learning.
        gaps = gaps or sampler_metrics([each for each, _ in pairs], result.logprobs)
    return {**{key: statistics.fmean(row[key] for row in rows) for key in rows[0]}, **gaps}


def self_check(learned: Mapping[str, float], kl: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
    """Before anything is learned, trainer, sampler and reference are one model: ratio 1, KL 0.

    That the sampler's weights are the trainer's, bit for bit, is checked by `synchronised` at every step.

    Returns:
        The figures, as metrics.

    Raises:
        TrainingError: They are not the same model.
    """
    between = {
        "trainer and sampler": learned["sampling/sampling_logp_difference/mean"],
        "policy and reference": statistics.fmean(abs(d) for group in kl for each in group for d in each),
    }
    figures = {
        "check/weights_equal": 1.0,
        "check/ratio_error": abs(learned["ratio"] - 1),
        "check/kl_at_start": kl_metrics(kl)["kl"],
    }
    for who, gap in between.items():
        figures[f"check/logprob_gap_{who.replace(' ', '_')}"] = gap
        if gap > LOGPROB_TOLERANCE:
            raise TrainingError(
                f"log-probs of {who} differ by {gap:.4f} nats a token before the first step (up to {LOGPROB_TOLERANCE} "
                "is numerics): they are not the same model"
            )
    return figures
