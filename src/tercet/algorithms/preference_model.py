"""A generative model of preference: shown two answers, it says which is better by one label token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.steps import OptimConfig, rows_of_step, steps_of, train
from tercet.chat.comparisons import ComparisonRenderer
from tercet.engine.base import Trainer
from tercet.errors import ConfigError
from tercet.evaluation.judges import agreement
from tercet.rewards.judge import Judge
from tercet.runs.run import Run
from tercet.types import Batch, Comparison


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(OptimConfig):
    """The second stage."""

    data: str = "builtin"
    """Comparisons: builtin, a hub id (name or name:config), a folder, or a json, jsonl, parquet or csv file."""
    test_data: str | None = None
    """Held-out comparisons; null takes the test split of `data`, or holds some of its rows out."""
    test_rows: int = 100
    """Held-out comparisons that are judged, at most."""
    max_length: int = 1024
    """Longest comparison in tokens; longer ones lose the beginning of their conversation."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    pairs_per_step: int = 4
    """Comparisons per optimizer step; each is shown in both orders in the same step."""
    epochs: int = 1
    """Times every comparison is learned."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null learns all epochs."""
    eval_every_steps: int = 20
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
        # Both orders in one step, so that no place is favoured; a model that sees one order a step stays at chance for long.
        return Batch([renderer.datum(each) for row in rows for each in (row, row.swapped())])

    train(
        batch_of,
        config,
        steps=config.steps(len(data)),
        trainer=trainer,
        run=run,
        evaluate=lambda: agreement(Judge(trainer.sampler(), renderer), held_out).metrics() if held_out else {},
        eval_every_steps=config.eval_every_steps,
    )
