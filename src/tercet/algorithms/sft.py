"""Supervised fine-tuning: make the answers of a data set likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.steps import OptimConfig, likelihood_metrics, rows_of_step, steps_of, train
from tercet.engine.base import Trainer
from tercet.errors import ConfigError
from tercet.evaluation.nll import HeldOut, nll
from tercet.runs.run import Run
from tercet.types import Batch, Datum


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OptimConfig):
    """The first stage."""

    data: str = "builtin"
    """Conversations: builtin, a hub id (name or name:config), a folder, or a json, jsonl, parquet or csv file."""
    test_data: str | None = None
    """Held-out conversations; null takes the test split of `data`, or holds some of its rows out."""
    test_rows: int = 64
    """Held-out conversations that are scored, at most."""
    train_on: str = "all_assistant_messages"
    """What is learned: all_assistant_messages, last_assistant_message, last_assistant_turn, all_messages, …"""
    max_length: int = 1024
    """Longest conversation in tokens; longer ones are left out and counted."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    batch_size: int = 16
    """Conversations per optimizer step."""
    epochs: int = 1
    """Times every conversation is learned."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null learns all epochs."""
    eval_every_steps: int = 20
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 20
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or self.epochs < 1:
            raise ConfigError(f"batch_size is {self.batch_size} and epochs {self.epochs}; both must be at least 1")

    def steps(self, rows: int) -> int:
        """Optimizer steps on so many conversations."""
        return steps_of(rows, self.batch_size, self.epochs, self.max_steps)


def sft(config: SFTConfig, data: Sequence[Datum], held_out: HeldOut, *, trainer: Trainer, run: Run, seed: int) -> None:
    """Learn the conversations, from wherever the run stands.

    Args:
        config: How.
        data: Conversations as tokens and weights.
        held_out: What the test NLL is measured on.
        trainer: What learns.
        run: Where it is written down; its total steps are `config.steps(len(data))`.
        seed: Of the order.
    """

    def batch_of(step: int) -> Batch:
        return Batch(rows_of_step(data, step, config.batch_size, epochs=config.epochs, seed=seed))

    train(
        batch_of,
        config,
        steps=config.steps(len(data)),
        trainer=trainer,
        run=run,
        evaluate=lambda: nll(trainer, held_out),
        eval_every_steps=config.eval_every_steps,
        measure=likelihood_metrics,
    )
