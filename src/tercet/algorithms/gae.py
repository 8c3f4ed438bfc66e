"""Advantages of tokens, and whitening. Pure arithmetic on lists of any lengths: there is no padding that could leak."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]

# TRL's constant, inside the root.
_EPSILON = 1e-8


def gae(rewards: Sequence[float], values: Sequence[float], *, gamma: float, lam: float) -> list[float]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv:1506.02438) of the tokens of one answer.

    After the last token the value is 0, also where the answer was cut off.

    Args:
        rewards: Of each token.
        values: What was expected before each token.
        gamma: Discount of later rewards.
        lam: 1 is the return minus the value, 0 the one-step error.

    >>> gae([0.0, 1.0], [0.5, 0.25], gamma=1.0, lam=1.0)
    [0.5, 0.75]
    """
    advantages: list[float] = []
    after = later = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        later = reward + gamma * after - value + gamma * lam * later
        advantages.append(later)
        after = value
    return advantages[::-1]


def mean_and_variance(rows: Rows) -> tuple[float, float]:
    """Mean and variance (n - 1) of the numbers of all rows; the variance of one number is 0."""
    flat = [x for row in rows for x in row]
    return statistics.fmean(flat), statistics.variance(flat) if len(flat) > 1 else 0.0


def whiten(rows: Rows, *, shift: bool = True) -> list[list[float]]:
    """All rows scaled to variance 1 together, and shifted to mean 0, or (`shift=False`) kept at their mean.

    >>> [round(x, 4) for x in whiten([[1.0], [3.0]])[0]]
    [-0.7071]
    """
    mean, variance = mean_and_variance(rows)
    scale = 1 / math.sqrt(variance + _EPSILON)
    return [[(x - mean) * scale + (0.0 if shift else mean) for x in row] for row in rows]
