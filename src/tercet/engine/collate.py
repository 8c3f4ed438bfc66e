"""Sequences that share prefixes, laid out so that every shared prefix is computed once.

`forest` merges sequences by exact token prefix into tries and lays them out depth first in one packed row. In that
order the tokens below a token are one contiguous range after it, so a single number per token, `subtree_end`, says all
about who sees whom: token t sees token u exactly when u <= t < subtree_end[u].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet.types import Batch

IntArray = NDArray[np.int64]

# What a pass costs beside its tokens, in tokens.
PIECE_TOKENS = 32


Range = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """A range of the row attended to together: it sees `ancestors`, and itself as far as the trie allows."""

    start: int
    end: int
    ancestors: tuple[Range, ...]
    """Ranges of the row before it, in order, with room between any two."""


@dataclass(frozen=True)
class Forest:
    """Sequences packed as tries; T tokens are left after merging."""

    tokens: IntArray
    """(T,) token ids."""
    positions: IntArray
    """(T,) depth of each token in its sequence."""
    subtree_end: IntArray
    """(T,) where the range of tokens below each token ends."""
    paths: tuple[IntArray, ...]
    """For each sequence, where its tokens lie in the row."""

    def units(self, max_tokens: int) -> list[Unit]:
        """Ranges for attention of up to `max_tokens`: neighbouring subtrees together, or a piece of one's trunk."""
        units: list[Unit] = []
        pending: list[tuple[int, int, tuple[Range, ...]]] = [(0, len(self.tokens), ())]
        while pending:
            start, end, ancestors = pending.pop()
            stop = start
            while stop < end and self.subtree_end[stop] - start <= max_tokens:
                stop = int(self.subtree_end[stop])
            if stop > start:
                units.append(Unit(start, stop, ancestors))
                if stop < end:
                    pending.append((stop, end, ancestors))
                continue
            # One subtree is larger than the limit: its trunk is a unit, or several; what is below comes in turn.
            below = int(self.subtree_end[start])
            branch = start + int(np.argmax(np.append(self.subtree_end[start:below] != below, True)))
            branch = min(branch, start + max_tokens)
            units.append(Unit(start, branch, ancestors))
            if below < end:
                pending.append((below, end, ancestors))
            if branch < below:
                pending.append((branch, below, _with_range(ancestors, (start, branch))))
        return sorted(units, key=lambda unit: unit.start)


def _with_range(ranges: tuple[Range, ...], added: Range) -> tuple[Range, ...]:
    if ranges and ranges[-1][1] == added[0]:
        return (*ranges[:-1], (ranges[-1][0], added[1]))
    return (*ranges, added)


def forest(sequences: Sequence[Sequence[int]]) -> Forest:
    """Merge sequences by common prefix.

    Raises:
        ValueError: A sequence is empty.
    """
    rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    if any(len(row) == 0 for row in rows):
        raise ValueError("a sequence is empty; there is nothing to compute")
    # The order of Python's lists puts a prefix before its extensions and shared prefixes side by side.
    ordered = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    paths: list[IntArray] = [np.empty(0, dtype=np.int64)] * len(rows)
    fresh: list[IntArray] = []
    depths: list[IntArray] = []
    closed: list[tuple[IntArray, int]] = []
    length = 0
    previous, path = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for i in ordered:
        shared = _common_prefix(previous, rows[i])
        closed.append((path[shared:], length))
        added = len(rows[i]) - shared
        path = np.concatenate([path[:shared], np.arange(length, length + added)])
        fresh.append(rows[i][shared:])
        depths.append(np.arange(shared, shared + added))
        paths[i], previous, length = path, rows[i], length + added
    closed.append((path, length))
    subtree_end = np.empty(length, dtype=np.int64)
    for tokens, end in closed:
        subtree_end[tokens] = end
    return Forest(np.concatenate(fresh), np.concatenate(depths), subtree_end, tuple(paths))


def _common_prefix(a: IntArray, b: IntArray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def micro_batches(batch: Batch, max_tokens: int) -> Iterator[list[int]]:
    """Indices of a batch's data in pieces of at most `max_tokens` tokens after merging, pairs kept together.

    Rows are taken in the order of their tokens, so that neighbours share as much prefix as can be, and cut where fewest
    tokens are computed twice: a group that fits into a piece is not split. A pair or a single sequence above the budget
    is a piece of its own, with what merges into it whole.
    """
    bundles = _bundles(batch)
    rows = [np.asarray(datum.tokens, dtype=np.int64) for datum in batch.data]
    last = np.empty(0, dtype=np.int64)
    order: list[list[int]] = []
    alone: list[int] = []
    added: list[int] = []
    for first in sorted(bundles, key=lambda i: rows[i].tolist()):
        members = [rows[i] for i in bundles[first]]
        more = _added_tokens(last, members)
        if more or not order:
            order.append(bundles[first])
            alone.append(_added_tokens(np.empty(0, dtype=np.int64), members))
            added.append(more)
        else:  # the same text again, which a piece computes once
            order[-1] = order[-1] + bundles[first]
        last = members[-1]
    # The cheapest way to lay out the first so many bundles, and where its last piece begins.
    cheapest, begins = [0], [0]
    for end in range(1, len(order) + 1):
        best, begin, after_first = cheapest[end - 1] + alone[end - 1], end - 1, added[end - 1]
        for start in range(end - 2, -1, -1):
            tokens = alone[start] + after_first
            if tokens > max_tokens:
                break
            if cheapest[start] + tokens < best:
                best, begin = cheapest[start] + tokens, start
            after_first += added[start]
        cheapest.append(best + PIECE_TOKENS)
        begins.append(begin)
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    for start, end in itertools.pairwise(reversed(cuts)):
        yield [i for members in order[start:end] for i in members]


def padded_micro_batches(batch: Batch, max_tokens: int) -> Iterator[list[int]]:
    """The same for rows that are padded to the longest of their piece: rows are taken in the order of their length."""
    bundles = _bundles(batch)
    longest = {first: max(len(batch.data[i].tokens) for i in members) for first, members in bundles.items()}
    piece: list[int] = []
    for first in sorted(bundles, key=lambda i: (longest[i], i)):
        if piece and (len(piece) + len(bundles[first])) * longest[first] > max_tokens:
            yield piece
            piece = []
        piece = piece + bundles[first]
    if piece:
        yield piece


def _bundles(batch: Batch) -> dict[int, list[int]]:
    """Data that pairs tie together, by the first of them."""
    partner: dict[int, set[int]] = {i: {i} for i in range(len(batch.data))}
    for members in (*batch.pairs, *batch.together):
        joined = set().union(*(partner[i] for i in members))
        for i in joined:
            partner[i] = joined
    return {min(members): sorted(members) for members in map(frozenset, partner.values())}


def _added_tokens(last: IntArray, rows: Sequence[IntArray]) -> int:
    """Tokens that rows add after `last`, each sharing with the one before it; never less than what merging leaves."""
    return sum(len(row) - _common_prefix(before, row) for before, row in itertools.pairwise([last, *rows]))
