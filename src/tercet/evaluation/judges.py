"""How good a judge is on comparisons it has not learned: accuracy, calibration, consistency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tercet.rewards.judge import Compares, LabelProbabilities
from tercet.types import Comparison, Conversation

BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Verdicts of similar confidence, and how often they were right."""

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Agreement:
    """A judge against the labels of held-out comparisons, each judged in both orders.

    `accuracy` is of single verdicts, `accuracy_both` of the mean of the two orders, which a tournament goes by.
    A tie in the labels counts in neither.
    """

    n: int
    nll: float
    accuracy: float
    accuracy_both: float
    ece: float
    """Expected calibration error (Guo et al. 2017): distance of confidence and accuracy, weighted by verdicts."""
    flip_rate: float
    """Share of comparisons whose verdict is for the same place in both orders."""
    accuracy_short_chosen: float
    """Accuracy (both orders) where the better answer is the shorter one."""
    accuracy_long_chosen: float
    """Accuracy (both orders) where it is not; NaN, as the other, where there are no such comparisons."""
    calibration: list[CalibrationBin]

    def metrics(self) -> dict[str, float]:
        """Under the keys of `metrics.jsonl`."""
        keys = ("nll", "accuracy", "accuracy_both", "ece", "flip_rate", "accuracy_short_chosen", "accuracy_long_chosen")
        return {f"test/{key}": getattr(self, key) for key in keys}

    def report(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def agreement(judge: Compares, comparisons: Sequence[Comparison]) -> Agreement:
    """Judge every decided comparison in both orders.

    Raises:
        ValueError: No comparison is decided.
    """
    decided = [Comparison(c.prompt, c.chosen, c.rejected, "A") for c in comparisons if c.label in ("A", "B")]
    if not decided:
        raise ValueError("there is no decided comparison to judge")
    seen = judge.probabilities([each for c in decided for each in (c, c.swapped())])
    first, second = seen[::2], seen[1::2]
    # The probability, among the labels, that each single verdict gives to the chosen answer.
    right = [p for a, b in zip(first, second, strict=True) for p in (a.a_share, 1 - b.a_share)]
    both = [float(b.margin > a.margin) for a, b in zip(first, second, strict=True)]
    shorter = [_length(c.chosen) < _length(c.rejected) for c in decided]
    return Agreement(
        n=len(decided),
        nll=-statistics.fmean(_label_logs(first, second)),
        accuracy=statistics.fmean(p > 0.5 for p in right),
        accuracy_both=statistics.fmean(both),
        ece=_ece(calibration(right), len(right)),
        flip_rate=statistics.fmean(a.margin * b.margin > 0 for a, b in zip(first, second, strict=True)),
        accuracy_short_chosen=_mean_where(both, shorter, True),
        accuracy_long_chosen=_mean_where(both, shorter, False),
        calibration=calibration(right),
    )


def calibration(right: Sequence[float]) -> list[CalibrationBin]:
    """Bins of equal width over the confidence of a verdict, from 0.5 to 1; empty ones are left out.

    Args:
        right: The probability each verdict gave to the right label.
    """
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for p in right:
        confidence = max(p, 1 - p)
        bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append(p)
    return [
        CalibrationBin(
            statistics.fmean(max(p, 1 - p) for p in members), statistics.fmean(p > 0.5 for p in members), len(members)
        )
        for members in bins
        if members
    ]


def _ece(bins: Sequence[CalibrationBin], n: int) -> float:
    return sum(each.n * abs(each.confidence - each.accuracy) for each in bins) / n


def _label_logs(first: Sequence[LabelProbabilities], second: Sequence[LabelProbabilities]) -> list[float]:
    # A probability may underflow to 0 for a judge that is sure and wrong; the floor keeps its cost finite.
    return [math.log(max(p, 1e-38)) for a, b in zip(first, second, strict=True) for p in (a.a, b.b)]


def _length(answer: Conversation) -> int:
    return sum(len(message.content) for message in answer)


def _mean_where(values: Sequence[float], flags: Sequence[bool], wanted: bool) -> float:
    chosen = [value for value, flag in zip(values, flags, strict=True) if flag is wanted]
    return statistics.fmean(chosen) if chosen else math.nan
