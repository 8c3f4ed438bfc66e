"""How likely held-out text is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tercet.engine.base import Trainer
from tercet.types import Batch, Datum


@dataclass(frozen=True)
class HeldOut:
    """Text that is never learned, and how many bytes its learned part has."""

    data: tuple[Datum, ...]
    text_bytes: int


def held_out(data: Sequence[Datum], decode: Callable[[list[int]], str]) -> HeldOut:
    """Count the bytes of the tokens that have weight."""
    counted = [[t for t, w in zip(datum.tokens, datum.weights, strict=True) if w] for datum in data]
    return HeldOut(tuple(data), sum(len(decode(tokens).encode()) for tokens in counted))


def nll(trainer: Trainer, text: HeldOut) -> dict[str, float]:
    """`test/nll`, nats per learned token, and `test/bpb`, bits per byte of the same text."""
    if not text.data:
        return {}
    logprobs = trainer.forward(Batch(text.data)).result().logprobs
    total = -sum(
        p * w for row, datum in zip(logprobs, text.data, strict=True) for p, w in zip(row, datum.weights, strict=True)
    )
    weight = sum(datum.weight for datum in text.data)
    return {"test/nll": total / weight, "test/bpb": total / (math.log(2) * text.text_bytes)}
