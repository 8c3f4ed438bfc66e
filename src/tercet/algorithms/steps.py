"""What every loop shares: learning rate by step, batches by step, one supervised loop. Functions, not a base class."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from tercet.data import index_at
from tercet.engine.base import Trainer
from tercet.errors import ConfigError, TrainingError
from tercet.runs.run import Run
from tercet.types import AdamParams, Batch, OptimResult, StepResult

Row = TypeVar("Row")
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a stage steps: AdamW with beta 0.9 and 0.95, epsilon 1e-8."""

    learning_rate: float
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up: linear or cosine to 0, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Scale the gradient down to this norm; null leaves it."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0 (2e-4 is usual for LoRA)")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must be 0 or above")

    def adam(self, step: int, total_steps: int) -> AdamParams:
        """The optimizer's settings at a step."""
        return AdamParams(
            learning_rate=self.learning_rate * self._share(step, total_steps),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )

    def _share(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        if self.schedule == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1.0


@dataclass(frozen=True, kw_only=True)
class PairsConfig(OptimConfig):
    """How a stage learns comparisons."""

    data: str = "builtin"
    """Comparisons: builtin, a hub id (name or name:config), a folder, or a json, jsonl, parquet or csv file."""
    test_data: str | None = None
    """Held-out comparisons; null takes the test split of `data`, or holds some of its rows out."""
    test_rows: int = 100
    """Held-out comparisons that are judged, at most."""
    max_length: int = 1024
    """Longest comparison in tokens; longer ones lose the beginning of their conversation."""
    pairs_per_step: int = 4
    """Comparisons per optimizer step."""
    epochs: int = 1
    """Times every comparison is learned."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null learns all epochs."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 20
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs_per_step < 1 or self.epochs < 1:
            raise ConfigError(
                f"pairs_per_step is {self.pairs_per_step} and epochs {self.epochs}; both must be at least 1"
            )

    def steps(self, rows: int) -> int:
        """Optimizer steps on so many comparisons."""
        return steps_of(rows, self.pairs_per_step, self.epochs, self.max_steps)


def steps_of(rows: int, rows_per_step: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps in so many epochs; the last may be smaller."""
    steps = -(-rows * epochs // rows_per_step)
    return steps if max_steps is None else min(steps, max_steps)


def rows_of_step(
    rows: Sequence[Row], step: int, rows_per_step: int, *, seed: int, epochs: int | None = None
) -> list[Row]:
    """The rows of a step, a function of its arguments alone: every row comes once an epoch; None has no last epoch."""
    first = step * rows_per_step
    last = first + rows_per_step if epochs is None else min(first + rows_per_step, len(rows) * epochs)
    return [rows[index_at(position, len(rows), seed=seed)] for position in range(first, last)]


def learn(trainer: Trainer, batch: Batch, loss: str, run: Run | None, **settings: float) -> StepResult:
    """Add a batch's gradient; if its loss is not finite, keep the batch in the run for whoever looks into it.

    Raises:
        TrainingError: The loss is not finite; names the file that holds the batch.
    """
    with _kept(batch, loss, settings, run):
        return trainer.forward_backward(batch, loss, **settings).result()


def learn_and_step(
    trainer: Trainer, batch: Batch, loss: str, adam: AdamParams, run: Run, **settings: float
) -> tuple[StepResult, OptimResult]:
    """Add a batch's gradient and take the optimizer step; a batch whose loss or gradient is not finite is kept.

    Raises:
        TrainingError: The loss or the gradient is not finite; names the file that holds the batch.
    """
    with _kept(batch, loss, settings, run):
        learned = trainer.forward_backward(batch, loss, **settings).result()
        return learned, trainer.optim_step(adam).result()


@contextmanager
def _kept(batch: Batch, loss: str, settings: Mapping[str, float], run: Run | None) -> Iterator[None]:
    try:
        yield
    except TrainingError as error:
        if run is None:
            raise
        path = run.directory / "failed-batch.json"
        data = [{"tokens": list(d.tokens), "weights": list(d.weights), **_streams(d.streams)} for d in batch.data]
        path.write_text(json.dumps({"loss": loss, "settings": settings, "data": data}))
        raise TrainingError(f"{error}; the batch is kept in {path}; a lower learning rate often helps") from error


def _streams(streams: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [float(value) for value in values] for name, values in streams.items()}


def train(
    batch_of: Callable[[int], Batch],
    config: OptimConfig,
    *,
    steps: int,
    trainer: Trainer,
    run: Run,
    evaluate: Callable[[], Mapping[str, float]],
    eval_every_steps: int,
    loss: str = "cross_entropy",
    settings: Mapping[str, float] | None = None,
    measure: Callable[[Batch, StepResult], Mapping[str, float]] = lambda batch, result: {},
) -> None:
    """Learn every batch once, from wherever the run stands. The last row holds the final evaluation."""
    start = run.start()
    if run.is_done:
        return
    if start.weights is not None:
        trainer.load(start.weights).result()
    for step in range(start.step, steps):
        began = time.monotonic()
        batch = batch_of(step)
        measured = evaluate() if eval_every_steps and step % eval_every_steps == 0 else {}
        result, optim = learn_and_step(trainer, batch, loss, config.adam(step, steps), run, **(settings or {}))
        run.log(step, {**batch_metrics(batch, result), **measure(batch, result), **measured,
                       "learning_rate": optim.learning_rate, "grad_norm": optim.grad_norm,
                       "progress": (step + 1) / steps, "time/step_s": time.monotonic() - began})  # fmt: skip
        if run.save_is_due(step + 1):
            run.save(trainer, next_step=step + 1)
    run.log(steps, evaluate())
    run.finish(trainer)


def batch_metrics(batch: Batch, result: StepResult) -> dict[str, float]:
    """What any step on given text tells."""
    return {
        "loss": result.loss,
        "num_sequences": len(batch.data),
        "num_tokens": sum(len(datum.tokens) for datum in batch.data),
    }


def likelihood_metrics(batch: Batch, result: StepResult) -> dict[str, float]:
    """What a step by likelihood tells besides."""
    return {
        "train_mean_nll": result.loss,
        **{name: value for name, value in result.metrics.items() if name == "entropy"},  # a service tells none
        "num_loss_tokens": sum(sum(weight != 0 for weight in datum.weights) for datum in batch.data),
    }
