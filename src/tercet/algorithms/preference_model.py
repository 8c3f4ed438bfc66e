"""A generative model of preference: shown two answers, it says which is better by one label token."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.steps import PairsConfig, likelihood_metrics, rows_of_step, train
from tercet.chat.comparisons import ComparisonRenderer
from tercet.engine.base import Trainer
from tercet.evaluation.judges import agreement
from tercet.rewards.judge import Judge
from tercet.runs.durable import write_atomically
from tercet.runs.run import Run
from tercet.types import Batch, Comparison, StepResult

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
        return Batch([renderer.datum(each) for row in rows for each in (row, row.swapped())])

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        found = agreement(Judge(trainer.sampler(), renderer), held_out)
        write_atomically(run.directory / AGREEMENT_FILE, json.dumps(found.report(), indent=1))
        return found.metrics()

    train(
        batch_of,
        config,
        steps=config.steps(len(data)),
        trainer=trainer,
        run=run,
        evaluate=evaluate,
        eval_every_steps=config.eval_every_steps,
        measure=label_metrics,
    )


def label_metrics(batch: Batch, result: StepResult) -> dict[str, float]:
    """Besides those of likelihood, the share of the labels that had more than half of the probability before they were
    learned."""
    accuracy = statistics.fmean(row[-1] > math.log(0.5) for row in result.logprobs)
    return {**likelihood_metrics(batch, result), "accuracy": accuracy}
