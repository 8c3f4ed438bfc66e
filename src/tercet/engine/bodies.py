"""Trainers and samplers of anything that has a `Body`: what the engines that compute on this machine share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tercet.engine import step
from tercet.engine.base import Sampler
from tercet.engine.budgets import Budgets
from tercet.engine.divergence import divergences
from tercet.engine.likeliest import top_logprobs
from tercet.engine.outputs import Body
from tercet.engine.sampler import generate, rows_at_once
from tercet.errors import CheckpointError, EngineError, TrainingError
from tercet.models.out_of_memory import first_line, give_back, ran_out
from tercet.types import (
    AdamParams,
    Batch,
    Completion,
    Datum,
    Head,
    OptimResult,
    SamplingParams,
    StepResult,
    TokenOutputs,
    TopLogprobs,
)  # fmt: skip

Result = TypeVar("Result")
OPTIMIZER_FILE = "optimizer.safetensors"
GENERATOR_FILE = "generator.safetensors"
HEAD_PARAMETER = "score.weight"


@dataclass(frozen=True)
class Language:
    """What an engine has to know of a tokenizer: which tokens end a text, and tokens -> text for stop strings."""

    eos: frozenset[int]
    decode: Callable[[list[int]], str]


class BodySampler:
    """See `tercet.engine.base.Sampler`."""

    def __init__(
        self,
        body: Callable[[], Body],
        tensors: Mapping[str, Tensor],
        language: Language,
        budgets: Budgets,
        width: int = 1,
    ) -> None:
        """Take over frozen weights.

        Args:
            body: Gives the model with these weights; asked for each piece of work.
            tensors: The trained weights, for the fingerprint; nobody changes them.
            language: Of the model.
            budgets: Of the engine.
            width: How many times a number of keys and values takes the bytes that the budget counts for it.
        """
        self.body, self.tensors, self.language, self.budgets = body, tensors, language, budgets
        self.width = width

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Future[list[list[Completion]]]:
        """See `Sampler`."""
        eos, decode = self.language.eos if params.eos else frozenset(), self.language.decode
        room = self.budgets.cache_tokens and max(1, self.budgets.cache_tokens // self.width)

        def draw(rows: int) -> list[list[Completion]]:
            return generate(
                self.body(), prompts, params, n, eos=eos, decode=decode, max_rows=rows,
                cache_tokens=room, seeds=seeds,
            )  # fmt: skip

        def rows_of(most: int) -> int:
            return rows_at_once(prompts, params, n, most, room)

        return done(lambda: self.budgets.within("max_rows", draw, rows_of))

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """See `Sampler`."""

        def work() -> list[list[float]]:
            begins = [1] * len(sequences) if starts is None else [max(1, start) for start in starts]
            data = []
            for i, (tokens, start) in enumerate(zip(sequences, begins, strict=True)):
                if start > len(tokens):
                    raise EngineError(f"sequence {i} has {len(tokens)} tokens; its log-probs cannot start at {start}")
                data.append(Datum(tokens, [0.0] * start + [1.0] * (len(tokens) - start)))
            body, batch = self.body(), Batch(data)
            out = scored(
                self.budgets,
                body,
                batch,
                lambda tokens: step.forward(body, batch, max_tokens=tokens, temperature=temperature),
            )
            return [row[start:] for row, start in zip(out.logprobs, begins, strict=True)]

        return done(work)

    def top_logprobs(
        self, sequences: Sequence[Sequence[int]], k: int, starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[TopLogprobs]]:
        """See `Sampler`."""

        def work() -> list[TopLogprobs]:
            body, batch = self.body(), unweighted(sequences)
            return scored(
                self.budgets,
                body,
                batch,
                lambda tokens: top_logprobs(body, sequences, k, starts, temperature=temperature, max_tokens=tokens),
            )

        return done(work)

    def divergences(
        self, other: Sampler, sequences: Sequence[Sequence[int]], starts: Sequence[int], temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """See `Sampler`."""

        def work() -> list[list[float]]:
            if not isinstance(other, BodySampler):
                raise EngineError("the divergence of two samplers needs both in the memory of one engine")
            # Whose body it is does not matter to how sequences are split.
            ours, theirs = self.body, other.body
            return scored(
                self.budgets,
                ours(),
                unweighted(sequences),
                lambda tokens: divergences(ours, theirs, sequences, starts, temperature=temperature, max_tokens=tokens),
            )

        return done(work)

    def fingerprint(self) -> str:
        """See `Sampler`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.tensors)


class BodyScorer:
    """See `tercet.engine.base.Scorer`; it takes over what a `BodySampler` does."""

    def __init__(self, body: Callable[[], Body], tensors: Mapping[str, Tensor], budgets: Budgets) -> None:
        self.body, self.tensors, self.budgets = body, tensors, budgets

    def scores(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """See `Scorer`."""

        def work() -> list[float]:
            body, batch = self.body(), unweighted(sequences)
            return scored(self.budgets, body, batch, lambda tokens: step.scores(body, sequences, max_tokens=tokens))

        return done(work)

    def fingerprint(self) -> str:
        """See `Scorer`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.tensors)


class BodyTrainer(ABC):
    """Gradient, optimizer and their state; what is left of `tercet.engine.base.Trainer` is which weights learn."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        budgets: Budgets,
        value_head: nn.Linear | None = None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over what learns.

        Args:
            parameters: By the names under which the optimizer's state is saved.
            budgets: Of the engine.
            value_head: The head, which learns as well.
            make_room: Called before a gradient is computed, which takes more memory than all else.
        """
        self.parameters, self.budgets, self.value_head = dict(parameters), budgets, value_head
        self.make_room = make_room
        if value_head is not None:
            self.parameters[HEAD_PARAMETER] = value_head.weight  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0)

    def head_weight(self) -> Tensor | None:
        """A copy of the head's weights (1, D), if there is a head."""
        return None if self.value_head is None else self.value_head.weight.detach().clone()

    def set_head(self, weight: Tensor | None) -> None:
        """Take over saved weights of the head.

        Raises:
            CheckpointError: There are some and no head, or the other way round.
        """
        if (weight is None) != (self.value_head is None):
            has, lacks = ("the trainer", "the save") if weight is None else ("the save", "the trainer")
            raise CheckpointError(f"{has} has a head, and {lacks} has none")
        if weight is not None and self.value_head is not None:
            with torch.no_grad():
                self.value_head.weight.copy_(weight)

    @abstractmethod
    def body(self) -> Body:
        """The model with these weights active."""

    def forward_backward(self, batch: Batch, loss: str, **settings: float) -> Future[StepResult]:
        """See `Trainer`. The setting `temperature` is that of the policy's distribution.

        A batch that fails leaves the gradient that was there before it; one whose loss is not finite leaves none.
        """

        def work() -> StepResult:
            body = self.body()
            self.make_room()
            # A backward pass that fails halfway has added to some parameters and not to others.
            before = {
                name: None if parameter.grad is None else parameter.grad.clone()
                for name, parameter in self.parameters.items()
            }

            def undo() -> None:
                for name, parameter in self.parameters.items():
                    grad = before[name]
                    parameter.grad = None if grad is None else grad.clone()

            try:
                return self.budgets.within(
                    "micro_batch_tokens",
                    lambda tokens: step.forward_backward(body, batch, loss, max_tokens=tokens, **settings),
                    lambda tokens: list(body.micro_batches(batch, tokens)),
                    undo,
                )
            except TrainingError:
                self.optimizer.zero_grad()
                raise

        return done(work)

    def forward(self, batch: Batch, *, temperature: float = 1.0, values_only: bool = False) -> Future[TokenOutputs]:
        """See `Trainer`."""

        def work() -> TokenOutputs:
            body = self.body()
            return scored(
                self.budgets,
                body,
                batch,
                lambda tokens: step.forward(
                    body, batch, max_tokens=tokens, temperature=temperature, values_only=values_only
                ),
            )

        return done(work)

    def optim_step(self, params: AdamParams) -> Future[OptimResult]:
        """See `Trainer`.

        Raises:
            TrainingError: The gradient is not finite; the weights stay as they were.
            EngineError: Memory ran out. Where there is no room for a step, all stays as it was, the gradient too; in
                the middle of one, which room asked for beforehand all but excludes, the words say that the weights are
                lost.
        """
        return done(lambda: self._optim_step(params))

    def _optim_step(self, params: AdamParams) -> OptimResult:
        for group in self.optimizer.param_groups:
            group["lr"], group["eps"] = params.learning_rate, params.eps
            group["betas"], group["weight_decay"] = (params.beta1, params.beta2), params.weight_decay
        self._room_for_a_step()
        limit = float("inf") if params.max_grad_norm is None else params.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if not np.isfinite(norm):
            self.optimizer.zero_grad()
            raise TrainingError(f"the gradient's norm is {norm}; the step was not taken")
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise EngineError(
                "memory ran out in the middle of a step: some weights have taken it and others have not; load the last "
                f"save ({first_line(error)})"
            ) from error
        self.optimizer.zero_grad()
        return OptimResult(norm, params.learning_rate)

    def _room_for_a_step(self) -> None:
        """Make what no batch has reached zero, and Adam's moments, which torch would make in the middle of the first
        step; and see that there is room for what a step works with.

        Raises:
            EngineError: There is not; nothing has changed.
        """
        parameters = list(self.parameters.values())
        fresh = [each for each in parameters if not self.optimizer.state.get(each)]
        largest = max(parameters, key=torch.numel, default=None)
        made: dict[Tensor, dict[str, Tensor]] = {}
        room: list[Tensor] = []
        said = None
        try:
            for each in parameters:
                if each.grad is None:
                    each.grad = torch.zeros_like(each)
            for each in fresh:
                made[each] = {"step": torch.tensor(0.0)}
                made[each] |= {name: torch.zeros_like(each) for name in ("exp_avg", "exp_avg_sq")}
            # A step works with one more number for each weight, on a GPU of all of them at once, elsewhere with two for
            # those of one parameter after the other.
            for each in parameters:
                copies = 1 if each.is_cuda else 2 * (each is largest)
                room.extend(torch.empty_like(each) for _ in range(copies))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            said = first_line(error)
        room.clear()
        if said is None:
            self.optimizer.state.update(made)
            return
        # Outside of the except clause, whose frames hold them, or there would be no more room when it is tried again.
        made.clear()
        give_back()
        size = sum(each.numel() * each.element_size() for each in parameters) / 1e9
        raise EngineError(
            f"memory ran out before the step ({said}); weights, gradient and optimizer are as they were. Adam "
            f"keeps two numbers for each weight, here {2 * size:.3g} GB: train an adapter, take a smaller model, or "
            "close other trainers"
        )

    def close(self) -> None:
        """See `Trainer`."""
        self.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        for parameter in self.parameters.values():
            parameter.grad = None
        self.parameters = {}

    def save_state(self, directory: Path) -> None:
        """Write optimizer and generator state."""
        state = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        save_file(state, directory / OPTIMIZER_FILE)
        save_file({"cpu": torch.random.get_rng_state()}, directory / GENERATOR_FILE)

    def load_state(self, directory: Path) -> None:
        """Take over what `save_state` wrote; a gradient that has not been used is dropped.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        try:
            saved = load_file(directory / OPTIMIZER_FILE)
            generator = load_file(directory / GENERATOR_FILE)["cpu"]
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{directory} has no optimizer state to go on from: {error}") from error
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in saved.items():
            name, _, what = key.rpartition(".")
            by_parameter.setdefault(name, {})[what] = value
        self.optimizer.state.clear()
        for name, state in by_parameter.items():
            parameter = self.parameters[name]
            # The step counter stays on the CPU: torch reads it there.
            self.optimizer.state[parameter] = {
                what: value if what == "step" else value.to(parameter.device) for what, value in state.items()
            }
        self.optimizer.zero_grad()
        torch.random.set_rng_state(generator)


def scored(budgets: Budgets, body: Body, batch: Batch, work: Callable[[int], Result]) -> Result:
    """Do work without gradient, which gets the token budget that memory allows."""
    return budgets.within("score_tokens", work, lambda tokens: list(body.micro_batches(batch, tokens)))


def unweighted(sequences: Sequence[Sequence[int]]) -> Batch:
    """Sequences of which nothing is learned."""
    return Batch([Datum(tokens, [0.0] * len(tokens)) for tokens in sequences])


def new_head(width: int, head: Head, *, seed: int) -> nn.Linear:
    """A head as a trainer begins with it; its draw depends on the seed alone."""
    std = (width + 1) ** -0.5 if head.init_std is None else head.init_std
    drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * std
    return head_of(drawn)


def head_of(weight: Tensor) -> nn.Linear:
    """A head (1, D) with these weights, float32."""
    layer = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device)
    layer.weight = nn.Parameter(weight.detach().clone().float())
    return layer


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of every byte."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether every byte is the same, as `fingerprint` sees it."""
    return ours.keys() == theirs.keys() and all(
        tensor.shape == theirs[name].shape
        and tensor.dtype == theirs[name].dtype
        and torch.equal(_whole_numbers(tensor), _whole_numbers(theirs[name].to(tensor.device)))
        for name, tensor in ours.items()
    )


def _whole_numbers(tensor: Tensor) -> Tensor:
    """The same bytes as whole numbers: of floating-point ones 0 equals -0, and NaN nothing."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def done(work: Callable[[], Result]) -> Future[Result]:
    """Do the work now. A future that is already done keeps the order of requests without a thread."""
    future: Future[Result] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
