"""Reinforcement learning from a tournament: answers to one prompt meet, a judge decides, winners become likelier."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tercet.algorithms.advantages import Scale, advantages, is_constant
from tercet.algorithms.rollouts import Answer, answer, length_metrics
from tercet.algorithms.steps import OptimConfig, learn, rows_of_step
from tercet.chat.renderers import Renderer
from tercet.engine.base import Sampler, Trainer
from tercet.errors import ConfigError, TrainingError
from tercet.rewards.judge import Judge, Verdict
from tercet.rewards.tournament import Match, Pattern, flip_rate, matches, scores
from tercet.runs.run import Run
from tercet.types import Batch, Comparison, Conversation, SamplingParams

# Sampler and trainer compute the same numbers by different routes; above this they are not the same model.
LOGPROB_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class RLConfig(OptimConfig):
    """The third stage."""

    data: str = "builtin"
    """Prompts: those of conversations or comparisons, from builtin, the hub, or files."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones are left out and counted."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    """How the learning rate falls."""
    steps: int = 20
    """Rounds of sampling and learning."""
    prompts_per_step: int = 8
    """Prompts answered per step."""
    group_size: int = 4
    """Answers per prompt; they meet each other."""
    max_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same one."""
    pattern: Pattern = "both_ways"
    """Which matches are played: both_ways (every ordered pair) or one_way (each pair once)."""
    chunk: int | None = None
    """Answers meet only within chunks of this size; null lets the whole group meet."""
    judge: Verdict = "soft"
    """soft reads label probabilities in one pass; hard takes greedy letters, as the published recipe."""
    format_penalty: float = 1.0
    """Taken off the reward of an answer that does not end with its stop."""
    scale: Scale = "none"
    """What is made of reward minus group mean: none, std (GRPO), rloo, batch."""
    loss: Literal["importance_sampling", "ppo", "cispo"] = "importance_sampling"
    """The policy-gradient loss."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference (the SFT policy), taken off the reward of each answer."""
    substeps: int = 1
    """Optimizer steps per round; the groups are dealt out among them."""
    eval_every_steps: int = 10
    """Steps between win-rate evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 5
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        matches(self.group_size, pattern=self.pattern, chunk=self.chunk)
        if not 1 <= self.substeps <= self.prompts_per_step:
            raise ConfigError(
                f"substeps is {self.substeps}; it must be at least 1 and at most prompts_per_step ({self.prompts_per_step})"
            )
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; exploring needs it above 0 (1.0 is usual)")

    @property
    def completions_per_step(self) -> int:
        """Answers sampled per step."""
        return self.prompts_per_step * self.group_size

    def sampling(self, renderer: Renderer, seed: int) -> SamplingParams:
        """How answers are drawn."""
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, stop=renderer.stop, seed=seed)


def policy_gradient(
    config: RLConfig,
    prompts: Sequence[Conversation],
    renderer: Renderer,
    judge: Judge,
    reference: Sampler,
    *,
    trainer: Trainer,
    run: Run,
    evaluate: Callable[[Sampler], Mapping[str, float]],
    seed: int,
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
        evaluate: Measures a policy.
        seed: Of the order and of every sample.
    """
    start = run.start()
    if run.is_done:
        return
    if start.weights is not None:
        trainer.load(start.weights).result()
    for step in range(start.step, config.steps):
        clock = [time.monotonic()]
        sampler = synchronised(trainer)
        measured = evaluate(sampler) if config.eval_every_steps and step % config.eval_every_steps == 0 else {}
        clock.append(time.monotonic())
        chosen = rows_of_step(prompts, step, config.prompts_per_step, seed=seed)
        groups = answer(chosen, sampler, renderer, config.sampling(renderer, seed + step), config.group_size)
        clock.append(time.monotonic())
        rewards, judged = tournament_rewards(config, groups, judge)
        kl = log_ratios(groups, reference, config.temperature)
        penalised = [
            [r - config.kl_coef * sum(d) for r, d in zip(*pair, strict=True)] for pair in zip(rewards, kl, strict=True)
        ]
        advantage = advantages(penalised, scale=config.scale)
        clock.append(time.monotonic())
        learned = learn_groups(config, groups, advantage, step, trainer=trainer, run=run)
        clock.append(time.monotonic())
        run.samples(step, sample_rows(groups, penalised, advantage))
        run.log(step, {**reward_metrics(groups, penalised), **judged, **kl_metrics(kl), **learned, **measured,
                       **length_metrics([each for group in groups for each in group]), **times(clock)})  # fmt: skip
        if step == 0:
            self_check(learned, kl)
        if run.save_is_due(step + 1):
            run.save(trainer, next_step=step + 1)
    run.log(config.steps, evaluate(trainer.sampler()))
    run.finish(trainer)


def synchronised(trainer: Trainer) -> Sampler:
    """The sampler of the newest weights.

    Raises:
        TrainingError: It does not hold the trainer's weights.
    """
    sampler = trainer.sampler()
    ours, theirs = trainer.fingerprint(), sampler.fingerprint()
    if ours != theirs:
        raise TrainingError(f"the sampler holds weights {theirs[:12]}, the trainer {ours[:12]}; they must be the same")
    return sampler


def tournament_rewards(
    config: RLConfig, groups: Sequence[Sequence[Answer]], judge: Judge
) -> tuple[list[list[float]], dict[str, float]]:
    """Play every group's matches in one call to the judge; the mean margin, less the penalty, is the reward."""
    played = matches(config.group_size, pattern=config.pattern, chunk=config.chunk)
    shown = [Comparison(g[i].prompt, g[i].conversation, g[j].conversation) for g in groups for i, j in played]
    flat = iter(judge.margins(shown))
    margins: list[dict[Match, float]] = [{match: next(flat) for match in played} for _ in groups]
    won = [scores(config.group_size, each) for each in margins]
    penalty = config.format_penalty
    rewards = [
        [score - penalty * (each.termination != "stop") for score, each in zip(row, group, strict=True)]
        for row, group in zip(won, groups, strict=True)
    ]
    answers = [each for group in groups for each in group]
    flips = statistics.fmean(flip_rate(each) for each in margins)
    return rewards, {
        "win_minus_loss": statistics.fmean(abs(score) for row in won for score in row),
        "format": statistics.fmean(each.termination == "stop" for each in answers),
        **({"judge/flip_rate": flips} if config.pattern == "both_ways" else {}),
    }


def log_ratios(groups: Sequence[Sequence[Answer]], reference: Sampler, temperature: float) -> list[list[list[float]]]:
    """For every token of every answer, how much likelier the policy finds it than the reference does, in nats.

    Its sum over an answer estimates the KL divergence of the policy from the reference (the estimator k1).
    """
    answers = [each for group in groups for each in group]
    sequences = [[*each.prompt_tokens, *each.completion.tokens] for each in answers]
    theirs = reference.logprobs(sequences, [len(each.prompt_tokens) for each in answers], temperature).result()
    flat = iter(
        [p - q for p, q in zip(each.completion.logprobs, row, strict=True)]
        for each, row in zip(answers, theirs, strict=True)
    )
    return [[next(flat) for _ in group] for group in groups]


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
    for part in range(config.substeps):
        mine = range(part, len(groups), config.substeps)
        pairs = [(each, a) for g in mine for each, a in zip(groups[g], advantage[g], strict=True)]
        data = [each.datum(sampling_logprobs=each.completion.logprobs, advantages=a) for each, a in pairs]
        result = learn(trainer, Batch(data), config.loss, run, temperature=config.temperature)
        optim = trainer.optim_step(config.adam(step, config.steps)).result()
        gaps = [
            q - p
            for (each, _), row in zip(pairs, result.logprobs, strict=True)
            for q, p in zip(each.completion.logprobs, row[len(each.prompt_tokens) :], strict=True)
        ]
        rows.append({
            **result.metrics,
            "loss": result.loss,
            "grad_norm": optim.grad_norm,
            "learning_rate": optim.learning_rate,
            "kl_sample_train_v1": statistics.fmean(gaps),
            "kl_sample_train_v2": statistics.fmean(gap * gap for gap in gaps) / 2,
            "sampling/sampling_logp_difference/max": max(map(abs, gaps)),
        })  # fmt: skip
    # What sampler and trainer disagree on before any step was taken is numerics; after that it is learning.
    return {**{k: statistics.fmean(r[k] for r in rows) for k in rows[0]}, **_first(rows[0])}


def _first(row: Mapping[str, float]) -> dict[str, float]:
    keys = ("kl_sample_train_v1", "kl_sample_train_v2", "sampling/sampling_logp_difference/max")
    return {f"{key}/first_substep": row[key] for key in keys[2:]} | {key: row[key] for key in keys}


def self_check(learned: Mapping[str, float], kl: Sequence[Sequence[Sequence[float]]]) -> None:
    """Before anything is learned, policy, sampler and reference are one model: ratio 1, KL 0.

    Raises:
        TrainingError: They are not.
    """
    gaps = {
        "trainer and sampler": learned["sampling/sampling_logp_difference/max/first_substep"],
        "policy and reference": max(abs(d) for group in kl for each in group for d in each),
    }
    for who, gap in gaps.items():
        if gap > LOGPROB_TOLERANCE:
            raise TrainingError(
                f"log-probs of {who} differ by up to {gap:.4f} nats before the first step (at most {LOGPROB_TOLERANCE} is "
                "numerics): they are not the same model"
            )


def reward_metrics(groups: Sequence[Sequence[Answer]], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """Rewards, how many groups teach nothing, and whether length alone explains the reward."""
    flat = [reward for row in rewards for reward in row]
    lengths = [float(len(each.completion.tokens)) for group in groups for each in group]
    return {
        "reward": statistics.fmean(flat),
        "reward_std": statistics.stdev(flat),
        "frac_reward_zero_std": statistics.fmean(is_constant(row) for row in rewards),
        "reward_length_correlation": _correlation(flat, lengths),
    }


def kl_metrics(kl: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
    """KL to the reference per answer: the unbiased estimator k1, and k3, which is never negative (per token, summed)."""
    sums = [(sum(d), sum(math.exp(-x) - 1 + x for x in d)) for group in kl for d in group]
    return {"kl": statistics.fmean(k1 for k1, _ in sums), "kl_k3": statistics.fmean(k3 for _, k3 in sums)}


def sample_rows(
    groups: Sequence[Sequence[Answer]], rewards: Sequence[Sequence[float]], advantage: Sequence[Sequence[float]]
) -> list[dict[str, object]]:
    """What was sampled, as rows of `samples.jsonl`."""
    return [
        {
            "group": g,
            "index": i,
            "prompt": [{"role": m.role, "content": m.content} for m in each.prompt],
            "completion": each.message.content,
            "reward": rewards[g][i],
            "advantage": advantage[g][i],
            "tokens": len(each.completion.tokens),
            "stop_reason": each.completion.stop_reason,
        }
        for g, group in enumerate(groups)
        for i, each in enumerate(group)
    ]


def times(clock: Sequence[float]) -> dict[str, float]:
    """Seconds of each part of a step."""
    names = ("time/eval_s", "time/sample_s", "time/judge_s", "time/train_s")
    parts = {name: b - a for name, (a, b) in zip(names, itertools.pairwise(clock), strict=True)}
    return {**parts, "time/step_s": clock[-1] - clock[0]}


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    constant = len(set(xs)) == 1 or len(set(ys)) == 1
    return 0.0 if constant else statistics.correlation(xs, ys)
