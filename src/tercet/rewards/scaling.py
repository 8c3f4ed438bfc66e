"""From scores to what PPO learns from: the end that is missing, the scale, the bounds. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MissingEnd = Literal["none", "penalise", "replace"]
ScoreScaling = Literal["none", "std", "mean_std"]

# TRL's constant, beside the standard deviation.
_EPSILON = 1e-8


@dataclass(frozen=True)
class Moments:
    """Mean and variance (n) of all numbers seen so far (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def with_batch(self, scores: Sequence[float]) -> Moments:
        """After some more numbers."""
        n, mean, variance = len(scores), statistics.fmean(scores), statistics.pvariance(scores)
        total, gap = self.count + n, mean - self.mean
        spread = self.variance * self.count + variance * n + gap * gap * self.count * n / total
        return Moments(total, self.mean + gap * n / total, spread / total)

    @property
    def std(self) -> float:
        """Standard deviation (n - 1); of a single number, 1."""
        return math.sqrt(self.variance * self.count / (self.count - 1)) if self.count > 1 else 1.0


def with_missing_ends(scores: Sequence[float], ended: Sequence[bool], *, how: MissingEnd, value: float) -> list[float]:
    """Scores of answers of which some were cut off before their end.

    Args:
        scores: Of the answers.
        ended: Whether each came to its end.
        how: `penalise` takes `value` off the score of one that did not (TRL); `replace` puts `value` in its place
            (Ziegler et al. 2019, with -1).
        value: See `how`.
    """
    if how == "none":
        return list(scores)
    cut = (lambda score: score - value) if how == "penalise" else (lambda score: value)
    return [score if end else cut(score) for score, end in zip(scores, ended, strict=True)]


def scaled(scores: Sequence[float], moments: Moments, *, how: ScoreScaling, clip: float | None) -> list[float]:
    """Scores over the standard deviation seen so far (`std`), their mean taken off first (`mean_std`), and bounded.

    Args:
        scores: Of a batch, which the moments include.
        moments: Of all scores so far.
        how: See above; `none` leaves the scale.
        clip: Bound at minus and plus this; None has no bound.
    """
    if how != "none":
        shift = moments.mean if how == "mean_std" else 0.0
        scores = [(score - shift) / (moments.std + _EPSILON) for score in scores]
    return [score if clip is None else max(-clip, min(clip, score)) for score in scores]
