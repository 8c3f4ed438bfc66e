"""Answers drawn by another program than the one that trains: both have the weights, but round differently.

The trainer's own log-probs take the place of the sampler's, and each answer is weighed by how much likelier the trainer
finds it, as importance sampling has it; one far likelier is left out, since its weight is noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from tercet.algorithms.rollout_metrics import sampler_metrics
from tercet.algorithms.rollouts import Answer
from tercet.engine.base import Trainer
from tercet.types import Batch

# As in the losses: a ratio above e^20 is a broken batch, and must stay finite to be seen in the metrics.
_MAX_LOG_RATIO = 20.0


def corrected(
    groups: Sequence[Sequence[Answer]], trainer: Trainer, *, temperature: float, cap: float
) -> tuple[list[list[Answer]], list[list[float]], dict[str, float]]:
    """Answers with the trainer's log-probs, the weight of each, and what was seen.

    Args:
        groups: As they were sampled.
        trainer: With the weights that sampled them.
        temperature: Of sampling.
        cap: See `sequence_mask`.
    """
    answers = [each for group in groups for each in group]
    rows = trainer.forward(Batch([each.datum() for each in answers]), temperature=temperature).result().logprobs
    ours = [tuple(row[len(each.prompt_tokens) :]) for each, row in zip(answers, rows, strict=True)]
    ratios = [sequence_ratio(p, each.completion.logprobs) for p, each in zip(ours, answers, strict=True)]
    weights = iter(sequence_mask(ratios, cap=cap))
    own = (
        replace(each, completion=replace(each.completion, logprobs=p)) for p, each in zip(ours, answers, strict=True)
    )
    seen = {
        **sampler_metrics(answers, rows),
        "sampling/importance_sampling_ratio/min": min(ratios),
        "sampling/importance_sampling_ratio/mean": statistics.fmean(ratios),
        "sampling/importance_sampling_ratio/max": max(ratios),
        "sampling/kept": statistics.fmean(ratio <= cap for ratio in ratios),
    }
    return [[next(own) for _ in group] for group in groups], [[next(weights) for _ in group] for group in groups], seen


def as_drawn(
    groups: Sequence[Sequence[Answer]],
) -> tuple[list[list[Answer]], list[list[float]], dict[str, float]]:
    """The same for answers that need no correction: each counts once."""
    return [list(group) for group in groups], [[1.0] * len(group) for group in groups], {}


def weighted(advantages: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> list[list[float]]:
    """Advantages times weights; every policy-gradient loss grows in proportion to its advantages."""
    return [[w * a for w, a in zip(*both, strict=True)] for both in zip(weights, advantages, strict=True)]


def sequence_ratio(trained: Sequence[float], sampled: Sequence[float]) -> float:
    """How many times likelier the trainer finds a whole answer than the sampler did: the product over its tokens."""
    return math.exp(max(-_MAX_LOG_RATIO, min(_MAX_LOG_RATIO, sum(trained) - sum(sampled))))


def sequence_mask(ratios: Sequence[float], *, cap: float) -> list[float]:
    """The weight of each answer: its ratio, or 0 where that is above `cap`."""
    return [ratio if ratio <= cap else 0.0 for ratio in ratios]
