"""A generative model of preference: shown two answers, it says which is better by one label token."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tercet.algorithms.steps import PairsConfig, likelihood_metrics, rows_of_step, train
from tercet.chat.comparisons import ComparisonRenderer
from tercet.engine.base import Trainer
from tercet.errors import ConfigError
from tercet.evaluation.judges import agreement
from tercet.rewards.judge import Compares, Judge
from tercet.runs.durable import write_atomically
from tercet.runs.run import Run
from tercet.types import Batch, Comparison, Datum, Label, StepResult

AGREEMENT_FILE = "agreement.json"
"""In a run's folder: accuracy, calibration and consistency at the newest evaluation."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(PairsConfig):
    """The second stage."""

    learning_rate: float = 1e-3
    """Peak learning rate; a small model needs a high one to leave the plateau at ln 2 early."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its peak."""
    pairs_per_step: int = 4
    """Comparisons per optimizer step; each is shown in both orders in the same step."""
    label_weight: float = 0.5
    """Share of the likelihood of single labels in the loss; the rest looks at both orders of a comparison together. 1
    is the published recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_weight <= 1:
            raise ConfigError(f"label_weight is {self.label_weight}; it must be above 0 and at most 1 (0.5 is usual)")


def preference_model(
    config: PreferenceConfig,
    data: Sequence[Comparison],
    held_out: Sequence[Comparison],
    renderer: ComparisonRenderer,
    *,
    trainer: Trainer,
    run: Run,
    seed: int,
) -> None:
    """Learn which answer is better, from wherever the run stands.

    Args:
        config: How.
        data: Labelled comparisons.
        held_out: What accuracy and calibration are measured on.
        renderer: How a comparison is shown.
        trainer: What learns.
        run: Where it is written down; its total steps are `config.steps(len(data))`.
        seed: Of the order.
    """

    def batch_of(step: int) -> Batch:
        rows = rows_of_step(data, step, config.pairs_per_step, epochs=config.epochs, seed=seed)
        # Both orders in one step, so that no place is favoured; shown one a step, a model stays at chance for long.
        if config.label_weight < 1:
            return both_orders(rows, renderer)
        return Batch([renderer.datum(each) for row in rows for each in (row, row.swapped())])

    train(
        batch_of,
        config,
        steps=config.steps(len(data)),
        trainer=trainer,
        run=run,
        evaluate=lambda: judged(Judge(trainer.sampler(), renderer), held_out, run),
        eval_every_steps=config.eval_every_steps,
        loss="both_orders" if config.label_weight < 1 else "cross_entropy",
        settings={"label_weight": config.label_weight} if config.label_weight < 1 else {},
        measure=label_metrics,
    )


def judged(judge: Compares, held_out: Sequence[Comparison], run: Run) -> dict[str, float]:
    """Metrics of a judge in training on held-out comparisons, if there are any; the run keeps what else was found."""
    if not held_out:
        return {}
    found = agreement(judge, held_out)
    write_atomically(run.directory / AGREEMENT_FILE, json.dumps(found.report(), indent=1))
    return found.metrics()


def both_orders(rows: Sequence[Comparison], renderer: ComparisonRenderer) -> Batch:
    """Every comparison in both orders, each with its label and with another one: a pair. The tokens that the four share
    are computed once, so that the other label costs nothing."""
    data: list[Datum] = []
    for row in rows:
        for shown in (row, row.swapped()):
            other: Label = "B" if shown.label == "A" else "A"
            data += [renderer.datum(shown), renderer.datum(replace(shown, label=other))]
    pairs = [(i, i + 1) for i in range(0, len(data), 2)]
    streams = {
        "comparisons": [float(i // 2) for i in range(len(pairs))],
        "decided": [float(row.label != "Tie") for row in rows for _ in range(2)],
    }
    return Batch(data, pairs, pair_streams=streams, together=[(i, i + 2) for i in range(0, len(data), 4)])


def label_metrics(batch: Batch, result: StepResult) -> dict[str, float]:
    """Before they were learned: likelihood of the labels, and the share of them that had more than half of the
    probability."""
    found = likelihood_metrics(batch, result)
    if not batch.pairs:
        return {**found, "accuracy": statistics.fmean(row[-1] > math.log(0.5) for row in result.logprobs)}
    shown = [batch.data[chosen] for chosen, _ in batch.pairs]
    return {
        **found,
        "train_mean_nll": result.metrics["label_nll"],
        "accuracy": result.metrics["accuracy"],
        "accuracy_both": result.metrics["accuracy_both"],
        # The other label of each is no sequence of its own.
        "num_sequences": len(shown),
        "num_tokens": sum(len(datum.tokens) for datum in shown),
        "num_loss_tokens": len(shown),
    }
