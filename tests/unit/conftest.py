"""Judges that say what they are told, for what is built on judges."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import renderer
from tercet.models.load import load_tokenizer
from tercet.rewards.judge import Judge
from tercet.types import Comparison, Completion, Message, SamplingParams

Opinion = Callable[[str, str], tuple[float, float]]


class OpinionSampler:
    """Reads the two answers in a prompt and gives the labels A and B the probabilities of an opinion, Tie the rest."""

    def __init__(self, shown: ComparisonRenderer, opinion: Opinion) -> None:
        self.shown, self.opinion = shown, opinion

    def probabilities(self, prompt: Sequence[int]) -> dict[int, float]:
        text = str(self.shown.renderer.tokenizer.decode(list(prompt)))
        found = re.search(
            r"Completion A ====\n\nAssistant: (.*?)\n\nSystem: ==== Completion B ====\n\nAssistant: (.*?)\n\nSystem:",
            text,
            re.S,
        )
        assert found is not None
        a, b = self.opinion(found[1], found[2])
        labels = self.shown.labels
        return {labels["A"]: a, labels["B"]: b, labels["Tie"]: 1 - a - b}

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        assert starts is not None
        rows = []
        for tokens, start in zip(sequences, starts, strict=True):
            p = self.probabilities(tokens[:start])[tokens[start]]
            rows.append([math.log(p) if p > 0 else -math.inf if p == 0 else math.nan])
        return done(rows)

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1
    ) -> Future[list[list[Completion]]]:
        assert (params.temperature, params.max_tokens, n) == (0, 1, 1)
        best = [max(p.items(), key=lambda item: item[1]) for p in map(self.probabilities, prompts)]
        return done([[Completion((token,), (math.log(p),), "length")] for token, p in best])

    def fingerprint(self) -> str:
        return "opinion"


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@pytest.fixture(scope="session")
def shown() -> ComparisonRenderer:
    """Comparisons in plain text, with the tokenizer of the model `tiny`."""
    return ComparisonRenderer(renderer("role_colon", load_tokenizer("tiny")), limit=512)


@pytest.fixture
def judge_of(shown: ComparisonRenderer) -> Callable[..., Judge]:
    """A judge with an opinion: (answer shown first, answer shown second) -> (P(A), P(B))."""

    def make(opinion: Opinion, **settings: str) -> Judge:
        return Judge(OpinionSampler(shown, opinion), shown, **settings)

    return make


@pytest.fixture
def compare() -> Callable[..., Comparison]:
    """A comparison of two texts."""

    def make(a: str, b: str, label: str | None = None, prompt: str = "Well?") -> Comparison:
        return Comparison((Message("user", prompt),), (Message("assistant", a),), (Message("assistant", b),), label)

    return make
