"""A group of answers to one prompt meets in pairs; who wins more is rewarded more. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from tercet.errors import ConfigError

Pattern = Literal["both_ways", "one_way"]
Match = tuple[int, int]


def matches(n: int, *, pattern: Pattern = "both_ways", chunk: int | None = None) -> list[Match]:
    """The matches (shown first, shown second) of a group.

    Args:
        n: Number of answers.
        pattern: `both_ways` is every ordered pair, so that a bias for a place cancels; `one_way` each pair once.
        chunk: Answers meet only inside neighbouring chunks of this size; None lets all meet.

    Raises:
        ConfigError: A chunk would hold a single answer, which meets nobody.

    >>> matches(3, pattern="one_way")
    [(0, 1), (0, 2), (1, 2)]
    """
    size = n if chunk is None else chunk
    if n < 2 or size < 2 or n % size == 1:
        raise ConfigError(f"a tournament of {n} answers in chunks of {size} leaves an answer that meets nobody")
    pairs = [
        (i, j)
        for at in range(0, n, size)
        for i in range(at, min(at + size, n))
        for j in range(i + 1, min(at + size, n))
    ]
    return pairs if pattern == "one_way" else [match for i, j in pairs for match in ((i, j), (j, i))]


def scores(n: int, margins: Mapping[Match, float]) -> list[float]:
    """Mean margin of each answer over the matches it took part in, in [-1, 1].

    Args:
        n: Number of answers.
        margins: For (i, j), how much j, shown second, is preferred to i.

    Raises:
        ValueError: An answer met nobody.

    >>> scores(2, {(0, 1): 0.5, (1, 0): 0.25})
    [-0.125, 0.125]
    """
    totals, met = [0.0] * n, [0] * n
    for (first, second), margin in margins.items():
        totals[first] -= margin
        totals[second] += margin
        met[first] += 1
        met[second] += 1
    if 0 in met:
        raise ValueError(f"answer {met.index(0)} met nobody")
    return [total / count for total, count in zip(totals, met, strict=True)]


def flip_rate(margins: Mapping[Match, float]) -> float:
    """Share of the pairs met both ways whose verdict changes with the order; 0.0 when no pair met both ways."""
    both = [(margins[i, j], margins[j, i]) for i, j in margins if i < j and (j, i) in margins]
    return sum(a * b > 0 for a, b in both) / len(both) if both else 0.0
