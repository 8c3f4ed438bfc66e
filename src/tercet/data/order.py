"""Which row comes when, a function of the arguments alone: a resumed run sees the rows an uninterrupted one sees."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TypeVar

from tercet.data.turns import opening
from tercet.errors import ConfigError, DataError
from tercet.types import Message

Row = TypeVar("Row")

# One number per use, so that the rows held out do not depend on the order of an epoch.
_EPOCHS, _HOLD_OUT = 1, 2


@lru_cache(maxsize=8)
def _permutation(n: int, use: int, seed: int, epoch: int) -> tuple[int, ...]:
    import numpy as np

    if min(n, seed, epoch) < 0:
        raise ConfigError(f"n is {n}, seed {seed}, epoch {epoch}; each must be 0 or above")
    # Raw 64-bit keys, sorted: numpy promises the bit stream of PCG64 for good, but not that of Generator.permutation.
    keys = np.random.PCG64(np.random.SeedSequence([use, seed, epoch])).random_raw(n)
    return tuple(int(i) for i in np.argsort(keys, kind="stable"))


def order(n: int, *, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch shows `n` rows: a permutation of ``range(n)``.

    >>> order(5, seed=0, epoch=0) == order(5, seed=0, epoch=0)
    True
    >>> sorted(order(5, seed=0, epoch=1))
    [0, 1, 2, 3, 4]
    """
    return list(_permutation(n, _EPOCHS, seed, epoch))


def index_at(position: int, n: int, *, seed: int) -> int:
    """The row shown at a position counted over all epochs; the data cursor of a run is this position.

    >>> [index_at(p, 3, seed=7) for p in range(3)] == order(3, seed=7, epoch=0)
    True
    """
    if n < 1 or position < 0:
        raise ConfigError(f"position is {position} of {n} rows; there must be a row, and positions begin at 0")
    return _permutation(n, _EPOCHS, seed, position // n)[position % n]


def hold_out(
    rows: Sequence[Row], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[list[Row], list[Row]]:
    """Set rows aside: (kept, held out), each in the order of `rows`.

    Rows that begin alike (the same turns up to the first of the user) stay together: no prompt is on both sides.
    At most `count` rows are held out, fewer when no group of rows is left that would fit; where all groups are larger,
    the smallest one is held out.

    Args:
        rows: Whatever has a prompt, conversations, or anything else, where every row is its own group.
        fraction: Share held out, above 0 and below 1; give this or `count`.
        count: How many are held out; 0 holds nothing out.
        seed: Another seed holds others out.

    Raises:
        ConfigError: Both or neither of `fraction` and `count`, or nothing would be kept.
        DataError: All rows begin alike.
    """
    if (fraction is None) == (count is None):
        raise ConfigError(f"fraction is {fraction} and count is {count}; give exactly one of them")
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction is {fraction}; it must be above 0 and below 1")
        count = max(1, round(fraction * len(rows)))
    assert count is not None
    if not 0 <= count < max(len(rows), 1):
        raise ConfigError(f"{count} of {len(rows)} rows to hold out; at least one must be kept")
    groups: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_group(index, row), []).append(index)
    members = list(groups.values())
    held: set[int] = set()
    places = _permutation(len(members), _HOLD_OUT, seed, 0)
    for place in places:
        if len(held) + len(members[place]) <= count:
            held.update(members[place])
    if count and not held:
        if len(members) == 1:
            raise DataError(
                f"{count} of {len(rows)} rows cannot be held out: all {len(rows)} begin alike, and such rows stay "
                "together; give rows with other prompts as well, or rows for tests by themselves (test_data)"
            )
        held.update(members[min(places, key=lambda place: len(members[place]))])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def _group(index: int, row: object) -> Hashable:
    prompt = getattr(row, "prompt", row)
    if isinstance(prompt, tuple) and all(isinstance(turn, Message) for turn in prompt):
        return opening(prompt)
    return index
