"""What a step of reinforcement learning tells: rewards, lengths, divergences, samples."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from tercet.algorithms.advantages import is_constant
from tercet.algorithms.rollouts import Answer
from tercet.types import as_messages


def length_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """How long the answers are, in tokens, and how many were cut off."""
    lengths = [len(each.completion.tokens) for each in answers]
    ended = [len(each.completion.tokens) for each in answers if each.completion.stop_reason != "length"]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": statistics.fmean(ended) if ended else 0.0,
    }


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
    """KL to the reference per answer: the unbiased estimator k1, and k3, never negative (per token, summed)."""
    sums = [(sum(d), sum(math.exp(-x) - 1 + x for x in d)) for group in kl for d in group]
    return {"kl": statistics.fmean(k1 for k1, _ in sums), "kl_k3": statistics.fmean(k3 for _, k3 in sums)}


def sampler_metrics(answers: Sequence[Answer], logprobs: Sequence[Sequence[float]]) -> dict[str, float]:
    """How far the trainer is from the sampler that drew the answers: mean gap (v1), half the mean square (v2), mean and
    largest distance.

    Args:
        answers: What was sampled.
        logprobs: The trainer's, for each whole sequence, prompt included.
    """
    gaps = [
        q - p
        for each, row in zip(answers, logprobs, strict=True)
        for q, p in zip(each.completion.logprobs, row[len(each.prompt_tokens) :], strict=True)
    ]
    return {
        "kl_sample_train_v1": statistics.fmean(gaps),
        "kl_sample_train_v2": statistics.fmean(gap * gap for gap in gaps) / 2,
        "sampling/sampling_logp_difference/mean": statistics.fmean(map(abs, gaps)),
        "sampling/sampling_logp_difference/max": max(map(abs, gaps)),
    }


def sample_rows(
    groups: Sequence[Sequence[Answer]],
    rewards: Sequence[Sequence[float]],
    learned_from: Sequence[Sequence[float]],
    name: str = "advantage",
) -> list[dict[str, object]]:
    """What was sampled, as rows of `samples.jsonl`: rewards, and under `name` what was made of them to learn from."""
    return [
        {
            "group": g,
            "index": i,
            "prompt": as_messages(each.prompt),
            "completion": each.message.content,
            "reward": rewards[g][i],
            name: learned_from[g][i],
            "tokens": len(each.completion.tokens),
            "stop_reason": each.completion.stop_reason,
        }
        for g, group in enumerate(groups)
        for i, each in enumerate(group)
    ]


def times(clock: Sequence[float], *parts: str) -> dict[str, float]:
    """Seconds of each part of a step, and of all of it; `clock` was read before the first and after each."""
    found = {f"time/{part}_s": b - a for part, (a, b) in zip(parts, itertools.pairwise(clock), strict=True)}
    return {**found, "time/step_s": clock[-1] - clock[0]}


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    constant = len(set(xs)) == 1 or len(set(ys)) == 1
    return 0.0 if constant else statistics.correlation(xs, ys)
