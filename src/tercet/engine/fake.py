"""An engine without a language model, for tests and examples: a table of logits, learned and sampled like any other.

The policy is a softmax over the next token for every context of the last few tokens. It has exact optima that one can
work out by hand, learns in seconds, and meets the same losses, packing, drawing and saving as a real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.engine.bodies import (
    BodySampler,
    BodyScorer,
    BodyTrainer,
    Language,
    done,
    fingerprint,
    head_of,
    new_head,
)  # fmt: skip
from tercet.engine.budgets import Budgets
from tercet.engine.outputs import Body
from tercet.errors import CheckpointError, EngineError
from tercet.models.tree_attention import Layout
from tercet.types import Head, LoraConfig, Weights

TABLE_FILE = "table.safetensors"


def letters(tokens: list[int]) -> str:
    """Token 0 is a, token 1 is b, and so on."""
    return "".join(chr(ord("a") + token) for token in tokens)


class Table(nn.Module):
    """The logits (contexts, V) of the next token; as a model's trunk, its hidden states are the logits themselves.

    A context is the last `order` tokens. The earlier ones are fetched through the layout's attention, as a transformer
    would: each position is a point on a circle, and a sharp enough softmax picks the token a fixed distance back.
    """

    def __init__(self, logits: Tensor, order: int, context_tokens: int) -> None:
        super().__init__()
        self.logits, self.order, self.context_tokens = nn.Parameter(logits.detach().clone()), order, context_tokens

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, layout: Layout, use_cache: bool = False
    ) -> SimpleNamespace:
        """What a transformers model's trunk gives for one packed row (1, T)."""
        tokens, positions = input_ids[0], position_ids[0]
        vocabulary = self.logits.shape[1]
        context = tokens
        for back in range(1, self.order):
            here, there = self._circle(positions), self._circle(positions - back)
            values = torch.stack([tokens.float(), torch.zeros(len(tokens))], dim=-1)[None]
            # Neighbours on the circle are 1 - cos(2 pi / n) apart: times this scale, 100 nats.
            scale = 100 / (1 - math.cos(2 * math.pi / self.context_tokens))
            before = layout.attend(back - 1, there, here, values, scale)[0, :, 0].round().long()
            context = context * (vocabulary + 1) + torch.where(positions >= back, before, vocabulary)
        return SimpleNamespace(last_hidden_state=self.logits.index_select(0, context)[None])

    def _circle(self, positions: Tensor) -> Tensor:
        angle = positions.double() * (2 * math.pi / self.context_tokens)
        return torch.stack([angle.cos(), angle.sin()], dim=-1).float()[None]


class FakeEngine:
    """See `tercet.engine.base.Engine`. An adapter's rank is not imitated: the whole table is learned either way.

    >>> engine = FakeEngine(vocabulary=3)
    >>> from tercet.types import SamplingParams
    >>> [[completion]] = engine.sampler().sample([[0]], SamplingParams(max_tokens=2)).result()
    >>> [round(logprob, 4) for logprob in completion.logprobs]  # ln(1/3): at its start every token is as likely
    [-1.0986, -1.0986]
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        order: int = 1,
        logits: Tensor | None = None,
        context_tokens: int = 64,
        eos: frozenset[int] = frozenset(),
        decode: Callable[[list[int]], str] = letters,
        budgets: Budgets | None = None,
    ) -> None:
        """Make the base.

        Args:
            vocabulary: Number of tokens V.
            order: Tokens that the next one depends on; before the beginning stands a token V of its own.
            logits: (V (V + 1)^(order - 1), V), the newest token counting most in the row's number; all 0 by default.
            context_tokens: Longest sequence, at most 1024.
            eos: Tokens that end a text.
            decode: Tokens to text, for stop strings.
            budgets: How much is computed at once.

        Raises:
            EngineError: The logits have another shape.
        """
        shape = (vocabulary * (vocabulary + 1) ** (order - 1), vocabulary)
        base = torch.zeros(shape) if logits is None else logits
        if base.shape != shape:
            raise EngineError(f"the logits have the shape {tuple(base.shape)}; {order=} and {vocabulary=} need {shape}")
        self.base = Table(base, order, context_tokens).requires_grad_(False)
        self.language, self.budgets = Language(eos, decode), budgets or Budgets()
        self._head = nn.Linear(vocabulary, vocabulary, bias=False).requires_grad_(False)
        self._head.weight.copy_(torch.eye(vocabulary))

    @property
    def context_tokens(self) -> int:
        """See `Engine`."""
        return self.base.context_tokens

    def trainer(
        self,
        *,
        init: Weights | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
        head: Head | None = None,
    ) -> FakeTrainer:
        """See `Engine`. Nothing but a head is random at the start. A head reads the logits of a context."""
        logits, saved = (self.base.logits, None) if init is None else self.read(init)
        value_head = None if saved is None else head_of(saved)
        if head is not None:
            value_head = new_head(self.base.logits.shape[1], head, seed=seed)
        return FakeTrainer(self, logits, value_head)

    def sampler(self, weights: Weights | None = None) -> BodySampler:
        """See `Engine`."""
        return self.frozen_sampler(*((self.base.logits, None) if weights is None else self.read(weights)))

    def frozen_sampler(self, logits: Tensor, head: Tensor | None) -> BodySampler:
        """A sampler of a copy of these logits."""
        body, tensors = self._frozen(logits, head)
        return BodySampler(lambda: body, tensors, self.language, self.budgets)

    def scorer(self, weights: Weights) -> BodyScorer:
        """See `Engine`."""
        return self.frozen_scorer(*self.read(weights))

    def frozen_scorer(self, logits: Tensor, head: Tensor | None) -> BodyScorer:
        """A scorer of a copy of these logits; an EngineError without a head."""
        if head is None:
            raise EngineError("these weights have no head to score with")
        body, tensors = self._frozen(logits, head)
        return BodyScorer(lambda: body, tensors, self.budgets)

    def _frozen(self, logits: Tensor, head: Tensor | None) -> tuple[Body, dict[str, Tensor]]:
        table = Table(logits, self.base.order, self.context_tokens).requires_grad_(False)
        value_head = None if head is None else head_of(head).requires_grad_(False)
        return self.body(table, value_head), named(table, value_head)

    def body(self, table: Table, value_head: nn.Linear | None = None) -> Body:
        """A table as a model: its hidden states are logits, so the head is the identity."""
        return Body(table, self._head, torch.device("cpu"), self.context_tokens, value_head)

    def read(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Saved logits and head; a CheckpointError where they are missing, damaged, or of another shape."""
        try:
            saved = load_file(weights.path / TABLE_FILE)
            logits: Tensor = saved["logits"]
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{weights.path} holds no table of logits: {error}") from error
        if logits.shape != self.base.logits.shape:
            raise CheckpointError(f"{weights.path} holds logits of another shape, {tuple(logits.shape)}")
        return logits, saved.get("head")


def named(table: Table, value_head: nn.Linear | None) -> dict[str, Tensor]:
    """What is learned, under the names of the saved file."""
    head = {} if value_head is None else {"head": value_head.weight.detach()}
    return {"logits": table.logits.detach(), **head}


class FakeTrainer(BodyTrainer):
    """See `tercet.engine.base.Trainer`."""

    def __init__(self, engine: FakeEngine, logits: Tensor, value_head: nn.Linear | None) -> None:
        self.engine, self.context_tokens = engine, engine.context_tokens
        self.table = Table(logits, engine.base.order, engine.context_tokens)
        super().__init__({"logits": self.table.logits}, engine.budgets, value_head)

    def body(self) -> Body:
        """The table as a model."""
        return self.engine.body(self.table, self.value_head)

    def sampler(self) -> BodySampler:
        """See `Trainer`."""
        return self.engine.frozen_sampler(self.table.logits, self.head_weight())

    def scorer(self) -> BodyScorer:
        """See `Trainer`."""
        return self.engine.frozen_scorer(self.table.logits, self.head_weight())

    def fingerprint(self) -> str:
        """See `Trainer`."""
        return fingerprint(named(self.table, self.value_head))

    def save(self, directory: Path) -> Future[Weights]:
        """See `Trainer`."""

        def work() -> Weights:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(named(self.table, self.value_head), directory / TABLE_FILE)
            self.save_state(directory)
            return Weights(directory)

        return done(work)

    def load(self, weights: Weights) -> Future[None]:
        """See `Trainer`."""

        def work() -> None:
            logits, head = self.engine.read(weights)
            with torch.no_grad():
                self.table.logits.copy_(logits)
            self.set_head(head)
            self.load_state(weights.path)

        return done(work)
