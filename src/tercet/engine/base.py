"""The seam between algorithms and machines: what an engine can do. No torch here.

Four verbs carry every algorithm: `forward_backward`, `optim_step`, `sample`, `save`. An engine knows tokens and losses;
it knows nothing of conversations, rewards or runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from tercet.types import (
    AdamParams,
    Batch,
    Completion,
    Head,
    LoraConfig,
    OptimResult,
    SamplingParams,
    StepResult,
    TokenOutputs,
    TopLogprobs,
    Weights,
)  # fmt: skip

# Mean difference, in nats a token, of log-probs found by two routes. Float32 gives 1e-6, bfloat16 from 0.01 to 0.05
# (the more, the less sure the model is); above this it is not the same model.
LOGPROB_TOLERANCE = 0.15


class Sampler(Protocol):
    """Frozen weights that sample and score. A later `optim_step` never changes it."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Future[list[list[Completion]]]:
        """Draw `n` completions of every prompt. Each is a function of (seed, prompt index, sample index) alone.

        With `seeds`, one a prompt, each prompt is drawn as the first and only one under its own seed.
        """
        ...

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """Log-prob (float32) of every token from `starts[i]` on (default 1: the first token has none)."""
        ...

    def top_logprobs(
        self, sequences: Sequence[Sequence[int]], k: int, starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[TopLogprobs]]:
        """The `k` likeliest tokens where `logprobs` speaks of the one that stands there."""
        ...

    def divergences(
        self, other: Sampler, sequences: Sequence[Sequence[int]], starts: Sequence[int], temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """KL of this sampler's distribution from another's, for every token from `starts[i]` on, in nats.

        Raises:
            EngineError: The other sampler is of another kind of engine.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the trained weights this sampler was made from."""
        ...


class Scorer(Protocol):
    """Frozen weights with a head, which give a sequence one number."""

    def scores(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """The head at the last token of every sequence."""
        ...

    def fingerprint(self) -> str:
        """A hash of the trained weights this scorer was made from."""
        ...


class Trainer(Protocol):
    """One set of trainable weights. Requests are done in the order they were made."""

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model takes."""
        ...

    def forward_backward(self, batch: Batch, loss: str, **settings: float) -> Future[StepResult]:
        """Add the gradient of the batch's loss. `loss` is a key of `tercet.losses.LOSSES`; settings go to it.

        Raises:
            EngineError: A stream the loss needs is missing, or the loss is unknown.
            TrainingError: The loss is not finite.
        """
        ...

    def optim_step(self, params: AdamParams) -> Future[OptimResult]:
        """One AdamW step on the gradient so far, which is then zero."""
        ...

    def forward(self, batch: Batch, *, temperature: float = 1.0, values_only: bool = False) -> Future[TokenOutputs]:
        """Log-probs, entropies and, with a head, values where weights are not zero; no gradient.

        `values_only` leaves out the first two, and the work for them.
        """
        ...

    def sampler(self) -> Sampler:
        """A frozen copy of the weights as they are now."""
        ...

    def scorer(self) -> Scorer:
        """The same, to score with.

        Raises:
            EngineError: There is no head.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the trained weights as they are now."""
        ...

    def save(self, directory: Path) -> Future[Weights]:
        """Write weights (PEFT's or Hugging Face's layout), optimizer and generator state into `directory`."""
        ...

    def load(self, weights: Weights) -> Future[None]:
        """Take over weights, optimizer and generator state written by `save`, exactly."""
        ...

    def close(self) -> None:
        """Let go of what the weights and their optimizer take in memory; the trainer is not used again."""
        ...


class Engine(Protocol):
    """One base model in memory; every adapter on it shares those weights."""

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model takes."""
        ...

    def trainer(
        self,
        *,
        init: Weights | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
        head: Head | None = None,
    ) -> Trainer:
        """New trainable weights: an adapter (`lora`) or the whole model (`lora=None`), from `init` or from the base.

        With `head` it gets a new head; without, the one that was saved with `init`, if any.
        """
        ...

    def sampler(self, weights: Weights | None = None) -> Sampler:
        """Frozen weights: a saved adapter or model, or the base itself (None)."""
        ...

    def scorer(self, weights: Weights) -> Scorer:
        """Frozen weights that were saved with a head.

        Raises:
            EngineError: They have none.
        """
        ...
