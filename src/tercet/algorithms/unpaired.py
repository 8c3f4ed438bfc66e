"""Learning from single answers that are labelled good or bad: KTO."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from tercet.algorithms.pairs import reference_sum, weighted_sum, with_fact, with_stream
from tercet.algorithms.steps import OptimConfig, rows_of_step, steps_of, train
from tercet.engine.base import Trainer
from tercet.errors import ConfigError, DataError
from tercet.runs.run import Run
from tercet.types import Batch, Datum, StepResult


@dataclass(frozen=True)
class Labelled:
    """An answer behind its prompt, and whether it is good. Weights are 1 on the answer, stop included."""

    datum: Datum
    desirable: bool
    mismatched: Datum | None = None
    """The same prompt with the answer to another one, on which the policy's divergence is estimated."""


@dataclass(frozen=True, kw_only=True)
class KTOConfig(OptimConfig):
    """Learning from labelled answers."""

    data: str = "builtin"
    """Labelled answers (prompt, completion, label), or comparisons, whose answers are taken one by one."""
    test_data: str | None = None
    """Held-out answers; null takes the test split of `data`, or holds some of its rows out."""
    test_rows: int = 100
    """Held-out answers that are measured, at most."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto counts from the policy's divergence, apo_zero_unpaired from 0."""
    beta: float = 0.1
    """Aversion to risk, per nat of log-ratio; above 0."""
    desirable_weight: float = 1.0
    """Of good answers; the two weights times the counts should be as 1 to 1, at most as 4 to 3."""
    undesirable_weight: float = 1.0
    """Of bad answers."""
    max_length: int = 1024
    """Longest prompt and answer in tokens; longer ones are left out and counted."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its peak."""
    rows_per_step: int = 16
    """Answers per optimizer step, at least 2."""
    epochs: int = 1
    """Times every answer is learned."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null learns all epochs."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 20
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; it must be above 0 (0.1 is usual)")
        if self.rows_per_step < 2 or self.epochs < 1:
            raise ConfigError(
                f"rows_per_step is {self.rows_per_step} and epochs {self.epochs}; they must be at least 2 and 1: the "
                "divergence is estimated on answers to other prompts of the step"
            )

    def steps(self, rows: int) -> int:
        """Optimizer steps on so many answers."""
        return steps_of(rows, self.rows_per_step, self.epochs, self.max_steps)


def mismatch(data: Sequence[Datum], limit: int) -> list[Datum]:
    """Each prompt with the answer of the nearest row before it, around the end, that has another prompt and fits.

    Where no other answer fits, the nearest loses its end.

    Args:
        data: Rows of at most `limit` tokens.
        limit: The most tokens of a prompt and the answer it is given.

    Raises:
        DataError: All rows have one prompt.
    """
    prompts = [prompt_tokens(datum) for datum in data]
    lengths = [len(datum.tokens) - len(prompt) for datum, prompt in zip(data, prompts, strict=True)]
    found = []
    for i, datum in enumerate(data):
        others = (i - k for k in range(1, len(data)) if prompts[i - k] != prompts[i])
        nearest = next(others, None)
        if nearest is None:
            raise DataError(
                f"all {len(data)} answers have the same prompt; the divergence is estimated on answers to other "
                "prompts, so give at least two prompts, or take the loss apo_zero_unpaired"
            )
        room = limit - len(prompts[i])
        fitting = (j for j in chain((nearest,), others) if lengths[j] <= room)
        other = next(fitting, nearest) if min(lengths) <= room else nearest
        start = len(prompts[other])
        found.append(
            Datum(
                (*prompts[i], *data[other].tokens[start : start + room]),
                (*datum.weights[: len(prompts[i])], *data[other].weights[start : start + room]),
            )
        )
    return found


def prompt_tokens(datum: Datum) -> tuple[int, ...]:
    """The tokens before the first that is learned."""
    first = next(t for t, weight in enumerate(datum.weights) if weight)
    return tuple(datum.tokens[:first])


def kto(
    config: KTOConfig, rows: Sequence[Labelled], held_out: Sequence[Labelled], *, trainer: Trainer, run: Run, seed: int
) -> None:
    """Learn the answers, from wherever the run stands.

    Args:
        config: How.
        rows: With the reference's log-probs.
        held_out: What rewards are measured on.
        trainer: What learns.
        run: Where it is written down; its total steps are `config.steps(len(rows))`.
        seed: Of the order.
    """

    def batch_of(step: int) -> Batch:
        chosen = rows_of_step(rows, step, config.rows_per_step, epochs=config.epochs, seed=seed)
        data = [with_fact(row.datum, "desirable", float(row.desirable)) for row in chosen]
        if config.loss == "kto":
            kl = divergence(trainer, chosen)
            data = [with_fact(datum, "kl", kl) for datum in data]
        return Batch(data)

    def measure(batch: Batch, result: StepResult) -> dict[str, float]:
        told = labelled_metrics(batch, result.logprobs, beta=config.beta)
        kl = {"kl": weighted_sum(batch.data[0], batch.data[0].streams["kl"])} if config.loss == "kto" else {}
        return {**result.metrics, **told, **kl}

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        batch = Batch([with_fact(row.datum, "desirable", float(row.desirable)) for row in held_out])
        return labelled_metrics(batch, trainer.forward(batch).result().logprobs, beta=config.beta, prefix="test/")

    train(
        batch_of,
        config,
        steps=config.steps(len(rows)),
        trainer=trainer,
        run=run,
        evaluate=evaluate,
        eval_every_steps=config.eval_every_steps,
        loss=config.loss,
        settings={
            "beta": config.beta,
            "desirable_weight": config.desirable_weight,
            "undesirable_weight": config.undesirable_weight,
        },
        measure=measure,
    )


def divergence(trainer: Trainer, rows: Sequence[Labelled]) -> float:
    """How far the policy is from the reference on answers to other prompts: the mean log-ratio, at least 0."""
    data = [row.mismatched for row in rows if row.mismatched is not None]
    found = trainer.forward(Batch(data)).result().logprobs
    ratios = [weighted_sum(datum, row) - reference_sum(datum) for datum, row in zip(data, found, strict=True)]
    return max(0.0, statistics.fmean(ratios))


def sequences(rows: Sequence[Labelled]) -> list[Datum]:
    """Everything that the reference is asked about, in order."""
    return [datum for row in rows for datum in (row.datum, row.mismatched) if datum is not None]


def with_references(rows: Sequence[Labelled], logprobs: Sequence[Sequence[float]]) -> list[Labelled]:
    """Rows with the reference's log-probs, given in the order of `sequences`."""
    found = iter(logprobs)

    def known(datum: Datum) -> Datum:
        return with_stream(datum, "reference_logprobs", next(found))

    return [
        Labelled(known(row.datum), row.desirable, None if row.mismatched is None else known(row.mismatched))
        for row in rows
    ]


def labelled_metrics(
    batch: Batch, logprobs: Sequence[Sequence[float]], *, beta: float, prefix: str = ""
) -> dict[str, float]:
    """Rewards and log-probs of good answers (chosen) and bad ones (rejected), under TRL's keys; no key without one."""
    sums = [weighted_sum(datum, row) for datum, row in zip(batch.data, logprobs, strict=True)]
    rewards = [beta * (total - reference_sum(datum)) for datum, total in zip(batch.data, sums, strict=True)]
    good = [weighted_sum(datum, datum.streams["desirable"]) > 0.5 for datum in batch.data]
    found: dict[str, float] = {}
    for name, wanted in (("chosen", True), ("rejected", False)):
        kind = [i for i, each in enumerate(good) if each == wanted]
        found[f"count/{name}"] = len(kind)
        if kind:
            found[f"rewards/{name}"] = statistics.fmean(rewards[i] for i in kind)
            found[f"logps/{name}"] = statistics.fmean(sums[i] for i in kind)
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return {prefix + name: value for name, value in found.items()}
