"""The engines that must all behave alike, each small enough to learn in a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tercet.engine.budgets import Budgets
from tercet.engine.fake import FakeEngine
from tercet.engine.local import LocalEngine
from tercet.models.load import load_model
from tercet.types import Batch, Datum, LoraConfig

EOS = 2
VOCABULARY = 8


@dataclass(frozen=True)
class Subject:
    """A kind of engine, and how its trainers are asked for. Tokens 3 to 7 mean the same length of text everywhere."""

    name: str
    lora: LoraConfig | None

    def engine(self, **budgets: int) -> Any:
        if self.name == "fake":
            generator = torch.Generator().manual_seed(7)
            logits = torch.randn(VOCABULARY * (VOCABULARY + 1), VOCABULARY, generator=generator)
            return FakeEngine(
                vocabulary=VOCABULARY, order=2, logits=logits, eos=frozenset({EOS}), budgets=Budgets(**budgets)
            )
        return LocalEngine(load_model("tiny"), **budgets)

    def trainer(self, engine: Any, **settings: Any) -> Any:
        return engine.trainer(lora=self.lora, **settings)

    def decode(self, engine: Any, tokens: list[int]) -> str:
        return engine.language.decode(tokens)


@pytest.fixture(params=["fake", "lora", "full"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param, LoraConfig(rank=4, alpha=8) if request.param == "lora" else None)


@pytest.fixture
def batch() -> Batch:
    """Eight sequences of unequal length with shared prefixes, unequal weights and everything a loss may ask for."""
    rows = (
        [3, 4, 5, 6], [3, 4, 5, 7, 7, 3], [3, 4], [5, 6, 7, 3, 4, 5, 6, 7], [3, 4, 5, 6], [7, 3, 3], [5, 6, 4, 4, 4],
        [6, 6, 6, 6, 6, 6, 6],
    )  # fmt: skip
    return Batch([
        Datum(
            row,
            [0.0, *(0.5 + (i + t) % 3 for t in range(len(row) - 1))],
            {
                "sampling_logprobs": [-2.0 - 0.1 * t for t in range(len(row))],
                "advantages": [1.0 - i / 3.0] * len(row),
            },
        )
        for i, row in enumerate(rows)
    ])  # fmt: skip


@pytest.fixture
def gradient() -> Callable[[Any], torch.Tensor]:
    """The gradient a trainer has so far, as one vector."""

    def flat(trainer: Any) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None])

    return flat
