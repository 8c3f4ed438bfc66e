"""From rewards to advantages: how much better than its group an answer is. Pure arithmetic on lists."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from tercet.errors import ConfigError

Scale = Literal["none", "std", "rloo", "batch"]

# TRL's constant; it only matters where a group hardly differs.
_EPSILON = 1e-4


def advantages(groups: Sequence[Sequence[float]], *, scale: Scale = "none") -> list[list[float]]:
    """Reward minus the group's mean, and what is made of it.

    Args:
        groups: Rewards of the answers to each prompt.
        scale: `none` is Tinker's and Dr. GRPO's (arXiv:2503.20783); `std` divides by the group's standard deviation
            (n - 1) plus 1e-4, as GRPO (arXiv:2402.03300); `rloo` compares with the mean of the others
            (arXiv:2402.14740); `batch` divides by the standard deviation of all rewards plus 1e-4.

    Raises:
        ConfigError: A group has one answer, which cannot be compared.

    >>> advantages([[1.0, 3.0]])
    [[-1.0, 1.0]]
    >>> advantages([[1.0, 3.0]], scale="rloo")
    [[-2.0, 2.0]]
    """
    for group in groups:
        if len(group) < 2:
            raise ConfigError(f"a group of {len(group)} has nothing to compare with; group_size must be at least 2")
    centred = [_centred(group) for group in groups]
    if scale == "std":
        spreads = [statistics.stdev(group) for group in groups]
        return [[a / (s + _EPSILON) for a in group] for group, s in zip(centred, spreads, strict=True)]
    if scale == "rloo":
        return [[a * len(group) / (len(group) - 1) for a in group] for group in centred]
    if scale == "batch":
        spread = statistics.stdev([reward for group in groups for reward in group])
        return [[a / (spread + _EPSILON) for a in group] for group in centred]
    return centred


def _centred(group: Sequence[float]) -> list[float]:
    # Measured from the first reward, so that equal rewards leave exact zeros and no dust of rounding.
    from_first = [reward - group[0] for reward in group]
    mean = statistics.fmean(from_first)
    return [each - mean for each in from_first]


def is_constant(group: Sequence[float]) -> bool:
    """Whether all rewards of a group are equal: such a group teaches nothing."""
    return max(group) == min(group)
