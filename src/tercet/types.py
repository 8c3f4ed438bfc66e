"""The nouns of tercet. No torch here: everything is plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tercet.errors import ConfigError, EngineError

Label = Literal["A", "B", "Tie"]
StopReason = Literal["stop", "eos", "length"]
TopLogprobs = list[list[tuple[int, float]]]
"""For each place the likeliest tokens with their log-probs, likeliest first."""


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant."""

    role: str
    content: str
    trainable: bool | None = None
    """Only read by train-on `customized`."""


Conversation = tuple[Message, ...]


def as_messages(turns: Conversation) -> list[dict[str, str]]:
    """Turns as plain data, as rows, templates and servers have them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@dataclass(frozen=True)
class Comparison:
    """Two answers to one conversation, and which of them is better.

    The label speaks of the places: "A" means the answer shown first is better.
    """

    prompt: Conversation
    a: Conversation
    b: Conversation
    label: Label | None = None
    margin: float = 0.0
    """By how much the better answer shall score higher, at least, where the data say it."""

    def swapped(self) -> Comparison:
        """The same comparison with the places, and so the label, exchanged."""
        other: dict[Label | None, Label | None] = {"A": "B", "B": "A", "Tie": "Tie", None: None}
        return replace(self, a=self.b, b=self.a, label=other[self.label])

    @property
    def chosen(self) -> Conversation:
        """The better answer.

        Raises:
            ValueError: The label is a tie or missing.
        """
        return self._answer("A", "B")

    @property
    def rejected(self) -> Conversation:
        """The worse answer.

        Raises:
            ValueError: The label is a tie or missing.
        """
        return self._answer("B", "A")

    def _answer(self, first: Label, second: Label) -> Conversation:
        if self.label == first:
            return self.a
        if self.label == second:
            return self.b
        raise ValueError(f"a comparison labelled {self.label} has neither a chosen nor a rejected answer")


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that somebody found good or bad by itself."""

    prompt: Conversation
    answer: Conversation
    good: bool


@dataclass(frozen=True)
class Datum:
    """One sequence to learn from.

    `tokens` is unshifted. `weights` and every stream are exactly as long, and position t speaks of predicting token t
    from the tokens before it; position 0 is predicted from nothing, so its weight is 0.
    `weights` is the only mask there is.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    streams: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"weights": self.weights, **self.streams}.items():
            if len(values) != len(self.tokens):
                raise EngineError(
                    f"{name} has {len(values)} entries for {len(self.tokens)} tokens; they must be as many"
                )
        if len(self.weights) and self.weights[0] != 0:
            raise EngineError("the first token is predicted from nothing: its weight must be 0")

    @property
    def weight(self) -> float:
        """Total weight."""
        return float(sum(self.weights))


@dataclass(frozen=True)
class Batch:
    """Sequences learned in one optimizer step; `pairs` holds (chosen, rejected) indices into `data`."""

    data: Sequence[Datum]
    pairs: Sequence[tuple[int, int]] = ()
    pair_weights: Sequence[float] | None = None
    """How much each pair counts; None weighs all alike."""
    pair_streams: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What a loss wants to know of each pair."""
    together: Sequence[tuple[int, ...]] = ()
    """Indices of data that a loss looks at together beyond pairs; they are never split either."""

    def __post_init__(self) -> None:
        weights = {} if self.pair_weights is None else {"pair_weights": self.pair_weights}
        for name, values in {**weights, **self.pair_streams}.items():
            if len(values) != len(self.pairs):
                raise EngineError(f"{name} has {len(values)} entries for {len(self.pairs)} pairs; they must be as many")
        for pair in (*self.pairs, *self.together):
            if not all(0 <= i < len(self.data) for i in pair):
                raise EngineError(f"the pair {pair} points outside the batch of {len(self.data)} sequences")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. Temperature 0 is greedy, and then log-probs are those of temperature 1."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    stop: tuple[str | int, ...] = ()
    """Stop strings and stop token ids; what stopped a sample is part of its tokens."""
    eos: bool = True
    """Whether the model's own end of a text ends a sample."""
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 or above"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or above"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "from 0 to below 1"),
        )
        for name, value, fine, wanted in limits:
            if not fine:
                raise ConfigError(f"{name} is {value}; it must be {wanted}")


@dataclass(frozen=True)
class Completion:
    """A sampled answer, stop tokens included. `logprobs` are under the distribution each token was drawn from."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685) on the base model's linear layers."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter; all-linear means every linear layer but the head."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1 (16 is usual)")
        if self.alpha <= 0:
            raise ConfigError(f"alpha is {self.alpha}; it must be above 0 (twice the rank is usual)")


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear layer from the last hidden state to one number: a reward model's score, or a critic's value."""

    init_std: float | None = None
    """Standard deviation of its first weights; None is 1 / sqrt(D + 1) for hidden states of width D (Stiennon et al.
    2020, arXiv:2009.01325)."""


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """One step of AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    """Scale the whole gradient down to this norm; None leaves it."""


@dataclass(frozen=True)
class Weights:
    """A saved adapter or model: a directory in PEFT's or Hugging Face's layout, with or without optimizer state."""

    path: Path


@dataclass(frozen=True)
class TokenOutputs:
    """What the model says: `logprobs[i][t]` is of `tokens[t]` of sequence i; 0.0 where the weight is 0."""

    logprobs: list[list[float]]
    entropies: list[list[float]]
    values: list[list[float]] = field(default_factory=list)
    """The head's output for the tokens before t; empty without a head."""


@dataclass(frozen=True)
class StepResult:
    """The normalised loss of a batch, its weighted mean metrics, and the log-probs it was computed from.

    `logprobs` is empty where the loss reads none.
    """

    loss: float
    metrics: dict[str, float]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class OptimResult:
    """What an optimizer step did."""

    grad_norm: float
    learning_rate: float
