"""Conversation trees as of Open Assistant (Köpf et al. 2023, arXiv:2304.07327).

A tree is a turn with its replies, each of which may have replies; those of the assistant are ranked, 0 being best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import cast

from tercet.data.turns import BadRow, Dropped, Row, compared, integer, message, need, text
from tercet.types import Comparison, Conversation


def tree_conversations(row: Row) -> Iterator[Conversation | Dropped]:
    """Every path from the root to a leaf that takes the best answer wherever the assistant speaks.

    What a user said last, unanswered, is cut off.
    """
    root = cast(Row, need(row, "prompt"))
    yield from _dropped(root)
    paths = [path for path in _best_paths(root, ()) if len(path) > 1]
    if not paths:
        yield Dropped("a tree without an answer")
    yield from paths


def tree_comparisons(row: Row) -> Iterator[Comparison | Dropped]:
    """Every pair of answers to the same turn that have different ranks, the better one first."""
    root = cast(Row, need(row, "prompt"))
    yield from _dropped(root)
    pairs = list(_pairs(root, ()))
    yield from pairs or [Dropped("a tree without ranked answers")]


def _best_paths(node: Row, before: Conversation) -> Iterator[Conversation]:
    path = (*before, *_turn(node))
    replies = _replies(node)
    if path[-1].role == "user":
        if replies:
            yield from _best_paths(min(replies, key=_unranked_last), path)
        return
    longer = [deeper for reply in replies for deeper in _best_paths(reply, path)]
    yield from longer or [path]


def _pairs(node: Row, before: Conversation) -> Iterator[Comparison | Dropped]:
    path = (*before, *_turn(node))
    replies = _replies(node)
    if path[-1].role == "user":
        ranked = sorted(((rank, place) for place, reply in enumerate(replies) if (rank := _rank(reply)) is not None))
        for (better, i), (worse, j) in combinations(ranked, 2):
            if better < worse:
                yield from compared(path, _turn(replies[i]), _turn(replies[j]))
    for reply in replies:
        yield from _pairs(reply, path)


def _unranked_last(reply: Row) -> tuple[bool, int]:
    rank = _rank(reply)
    return rank is None, rank or 0


def _dropped(node: Row) -> Iterator[Dropped]:
    for reply in _children(node):
        if reply.get("deleted"):
            yield Dropped("a deleted turn")
        else:
            yield from _dropped(reply)


def _turn(node: Row) -> Conversation:
    turn = message({"role": need(node, "role"), "content": text(node, "text")})
    return () if turn is None else (turn,)


def _replies(node: Row) -> list[Row]:
    return [reply for reply in _children(node) if not reply.get("deleted")]


def _children(node: Row) -> list[Row]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise BadRow("'replies' must be a list of turns")
    return replies


def _rank(reply: Row) -> int | None:
    return None if reply.get("rank") is None else integer(reply, "rank")
