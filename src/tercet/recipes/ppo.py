"""PPO by itself: from a policy and a reward that are there already."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tercet.algorithms.ppo import Columns, PPOConfig, ppo
from tercet.algorithms.ppo_step import PPO
from tercet.algorithms.rollouts import Answer, candidates
from tercet.engine.base import Sampler
from tercet.recipes.evaluate import Arena, EvaluationConfig
from tercet.recipes.reward_source import RewardSourceConfig, reward_of
from tercet.recipes.rl import write_evaluation
from tercet.recipes.rows import held_out_questions, prompt_columns, prompts_to_learn, rows_sha256
from tercet.recipes.session import Say, Session, SetupConfig, open_session
from tercet.recipes.stages import open_run
from tercet.recipes.trained import check_same_base, judge_at, weights_at
from tercet.rewards.combined import WeightedSum
from tercet.rewards.interface import Candidate
from tercet.rewards.judge import Compares
from tercet.rewards.scalar import RewardJudge
from tercet.types import Conversation, Head, Weights


@dataclass(frozen=True, kw_only=True)
class PPORunConfig(PPOConfig, SetupConfig):
    """Learn from scores of the policy's own answers, with a critic and a KL to the policy at the start."""

    policy: str = "base"
    """The policy to start from, which is also the reference: the folder of a run, an adapter's directory, or base."""
    reward: RewardSourceConfig = field(default_factory=RewardSourceConfig)
    """What answers are rewarded by."""
    critic_from: Literal["reward", "policy"] = "reward"
    """What a separate critic starts from: the reward model, where reward.model names one, or the policy with a new
    head."""
    judge_model: str | None = None
    """A preference model that watches and is never optimised: the folder of a run of tercet preference."""
    test_data: str | None = None
    """Held-out prompts; null takes the test split of `data`, or holds some of its prompts out."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How policies are compared."""
    out: str = "runs/ppo"
    """Folder of the run; the same command goes on where it stood."""


def train_ppo(config: PPORunConfig, *, say: Say = print) -> Path:
    """Train, then compare the policy with the one it started from in `evaluation.json`.

    Returns:
        The run's folder.
    """
    config.reward.check()
    check_same_base(config, config.policy, config.reward.model, config.judge_model, config.reward.tournament)
    start = weights_at(config.policy, "policy")
    session = open_session(config, say)
    reward = reward_of(session, config.reward)
    columns = prompt_columns(session, config.data) if config.reward.function or config.reward.url else {}
    judges = judges_of(session, config.reward, reward, columns, config.judge_model)
    held_out = held_out_questions(session, config.data, config.test_data, config.evaluation.prompts)
    arena = Arena(session, config.evaluation, held_out, judges)
    board = Scoreboard(arena, None if config.reward.tournament else Alone(reward, columns), start)
    directory = Path(config.out)
    weights = run_ppo(
        session,
        config,
        directory,
        prompts_to_learn(session, config, arena.questions),
        init=start,
        critic_init=critic_weights(config.reward, start) if config.critic_from == "reward" else start,
        reward=reward,
        evaluate=lambda sampler, step: board.measure(sampler, last=step == config.steps),
        kept=session.config_of(PPORunConfig, config),
        origin=origin_of(session, start, config.reward),
        columns=columns,
    )
    if not (directory / "evaluation.json").exists():
        say("evaluation: the policy and the one it started from, on held-out prompts")
        write_evaluation(directory, board.report({"start": board.start, "rl": session.engine.sampler(weights)}))
    return directory


def run_ppo(
    session: Session,
    config: PPOConfig,
    directory: Path,
    prompts: Sequence[Conversation],
    *,
    init: Weights | None,
    critic_init: Weights | None,
    reward: WeightedSum,
    evaluate: Callable[[Sampler, int], Mapping[str, float]],
    kept: Mapping[str, object],
    origin: Mapping[str, str],
    columns: Columns | None = None,
    stage: str = "ppo",
) -> Weights:
    """Stage 3: reinforcement learning with a critic.

    Args:
        session: Model and machine.
        config: How.
        directory: The run's folder.
        prompts: What is answered.
        init: The policy at the start, which is also the reference; None is the base.
        critic_init: What a separate critic starts from; one without a head gets a new one.
        reward: Scores the answers.
        evaluate: Measures a policy now and then.
        kept: The config that the folder keeps.
        origin: Hashes of the weights it begins with.
        columns: What the data say of prompts.
        stage: Its name.
    """
    setup = session.setup
    longest = max(len(session.renderer.generation_prompt(prompt)) for prompt in prompts)
    # Beside the reference the model that rewards and a judge that is held out.
    memory = session.memory(
        sampled_rows=config.completions_per_step,
        row_tokens=longest + config.max_tokens,
        trainers=1 if config.critic == "shared" else 2,
        others=3,
    )
    with open_run(
        session,
        directory,
        stage,
        kept,
        {"rows_sha256": rows_sha256(prompts), **origin},
        steps=config.steps,
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.completions_per_step} answers, each learned {config.ppo_epochs} times with a "
        f"{config.critic} critic, {len(prompts):,} prompts in all; {memory}",
    ) as run:
        if not run.is_done:
            engine, shared = session.engine, config.critic == "shared"
            head = Head(init_std=0.0)
            policy = engine.trainer(init=init, lora=setup.adapter, seed=setup.seed, head=head if shared else None)
            critic = None
            if not shared:
                has_head = critic_init is not None and critic_init != init
                critic = engine.trainer(
                    init=critic_init, lora=setup.adapter, seed=setup.seed + 1, head=None if has_head else head
                )
            learner = PPO(
                config, policy, engine.sampler(init),
                critic=critic, total_steps=config.steps, seed=setup.seed, run=run,
            )  # fmt: skip
            ppo(
                config, prompts, session.renderer, reward, learner,
                run=run, evaluate=evaluate, seed=setup.seed, columns=columns,
            )  # fmt: skip
        return run.final_weights


def critic_weights(config: RewardSourceConfig, start: Weights | None) -> Weights | None:
    """The reward model's, where there is one; else the policy's."""
    return start if config.model is None else weights_at(config.model, "reward.model")


def origin_of(session: Session, start: Weights | None, config: RewardSourceConfig) -> dict[str, str]:
    """Hashes of the policy at the start and of the models it is rewarded by."""
    models = {"reward": config.model, "tournament": config.tournament}
    return {
        "policy_sha256": session.fingerprint(start),
        **{
            f"{name}_sha256": session.fingerprint(weights_at(place, f"reward.{name}"))
            for name, place in models.items()
            if place is not None
        },
    }


def judges_of(
    session: Session, config: RewardSourceConfig, reward: WeightedSum, columns: Columns, judge_model: str | None
) -> dict[str, Compares]:
    """Who compares answers: what the policy is rewarded by, and a judge that watches."""
    judges: dict[str, Compares] = {"preference": RewardJudge(Alone(reward, columns))}
    if config.tournament is not None:
        judges["preference"] = judge_at(session, config.tournament, what="reward.tournament")
    if judge_model is not None:
        judges["held_out"] = judge_at(session, judge_model)
    return judges


class Alone:
    """A run's reward for answers that stand alone; see `AnswerReward`."""

    def __init__(self, reward: WeightedSum, columns: Columns) -> None:
        self.reward, self.columns = reward, columns

    def rewards(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """Each answer as a group of one."""
        told = [[replace(each, columns=self.columns.get(each.prompt, {}))] for each in candidates]
        return [score for [score] in self.reward.group_rewards(told)]


class Scoreboard:
    """What held-out answers score, beside the win rates of an arena."""

    def __init__(self, arena: Arena, reward: Alone | None, start: Weights | None) -> None:
        """Take the judges' arena, the reward (none where only groups have one) and the policy at the start."""
        self.arena, self.reward = arena, reward
        self.start = arena.session.engine.sampler(start)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Mean and standard deviation of the reward of a policy's answers, as they were given."""
        if self.reward is None:
            return {}
        found = self.reward.rewards([each for [each] in candidates([[each] for each in answers])])
        flat = [score for score in found if score is not None]
        return {"score": statistics.fmean(flat), "score_std": statistics.stdev(flat)}

    def measure(self, policy: Sampler, *, last: bool) -> dict[str, float]:
        """Scores, their gain in standard deviations of the policy at the start, and win rates against it."""
        every = len(self.arena.questions)
        n = every if last else min(self.arena.config.prompts_while_training, every)
        now, before = (self.scores(self.arena.answers(each, n)) for each in (policy, self.start))
        found = {f"test/{name}": value for name, value in now.items()}
        if before and before["score_std"]:
            found["test/score_gain"] = (now["score"] - before["score"]) / before["score_std"]
        return {**found, **self.arena.measure(policy, self.start, last=last)}

    def report(self, policies: Mapping[str, Sampler]) -> dict[str, Any]:
        """Everything `evaluation.json` says."""
        found = self.arena.report(policies, start="start")
        n = len(self.arena.questions)
        for name, policy in policies.items():
            found["policies"][name] |= self.scores(self.arena.answers(policy, n))
        return found
