"""REBEL: regress the difference of rewards on the difference of log-ratios (Gao et al. 2024, arXiv:2404.16767)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.pairs import Pair, pair_metrics, pairs_batch, reference_sum, weighted_sum
from tercet.algorithms.steps import OptimConfig, Schedule, rows_of_step, steps_of, train
from tercet.engine.base import Trainer
from tercet.errors import ConfigError
from tercet.runs.run import Run
from tercet.types import Batch, StepResult


@dataclass(frozen=True, kw_only=True)
class RebelConfig(OptimConfig):
    """How a policy learns from pairs with rewards."""

    eta: float = 1.0
    """How far the policy moves: it ends at the old one times exp(eta times reward). Small rewards want a large one."""
    temperature: float = 0.8
    """At which the answers were drawn; log-probs are taken at the same one."""
    kl_coef: float = 0.0
    """Weight of the divergence from the first policy, taken off the rewards."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up: linear or cosine to 0, or constant."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its peak."""
    max_grad_norm: float | None = None
    """Scale the gradient down to this norm; null leaves it, so that a step keeps the size of its reward gaps."""
    pairs_per_step: int = 8
    """Pairs per optimizer step."""
    epochs: int = 1
    """Times every pair is learned."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null learns all epochs."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 20
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta <= 0 or self.temperature <= 0:
            raise ConfigError(f"eta is {self.eta} and temperature {self.temperature}; both must be above 0")
        if self.kl_coef < 0:
            raise ConfigError(f"kl_coef is {self.kl_coef}; it must be 0 or above")
        if self.pairs_per_step < 1 or self.epochs < 1:
            raise ConfigError(
                f"pairs_per_step is {self.pairs_per_step} and epochs {self.epochs}; both must be at least 1"
            )

    def steps(self, rows: int) -> int:
        """Optimizer steps on so many pairs."""
        return steps_of(rows, self.pairs_per_step, self.epochs, self.max_steps)


def rebel(
    config: RebelConfig, pairs: Sequence[Pair], held_out: Sequence[Pair], *, trainer: Trainer, run: Run, seed: int
) -> None:
    """Learn the pairs, from wherever the run stands.

    Args:
        config: How.
        pairs: With reward gaps and the log-probs of the policy that drew them.
        held_out: What the published loss and the agreement of signs are measured on.
        trainer: What learns.
        run: Where it is written down; its total steps are `config.steps(len(pairs))`.
        seed: Of the order.
    """

    def batch_of(step: int) -> Batch:
        return pairs_batch(rows_of_step(pairs, step, config.pairs_per_step, epochs=config.epochs, seed=seed))

    def measure(batch: Batch, result: StepResult) -> dict[str, float]:
        told = dict(result.metrics)
        published = {"loss": told.pop("published_loss"), "scaled_loss": result.loss}
        return {**told, **published, **gap_metrics(batch, result.logprobs, eta=config.eta)}

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        batch = pairs_batch(held_out)
        found = trainer.forward(batch, temperature=config.temperature).result().logprobs
        return {f"test/{name}": value for name, value in gap_metrics(batch, found, eta=config.eta, loss=True).items()}

    train(
        batch_of,
        config,
        steps=config.steps(len(pairs)),
        trainer=trainer,
        run=run,
        evaluate=evaluate,
        eval_every_steps=config.eval_every_steps,
        loss="rebel",
        settings={"eta": config.eta, "temperature": config.temperature},
        measure=measure,
    )


def gap_metrics(
    batch: Batch, logprobs: Sequence[Sequence[float]], *, eta: float, loss: bool = False
) -> dict[str, float]:
    """What a policy makes of pairs: TRL's keys with a beta of 1 / eta, so that rewards are in the reward's own units,
    and the sizes of the two gaps; with `loss` the published loss as well."""
    ratios = [weighted_sum(datum, row) - reference_sum(datum) for datum, row in zip(batch.data, logprobs, strict=True)]
    predicted = [(ratios[c] - ratios[r]) / eta for c, r in batch.pairs]
    wanted = batch.pair_streams["reward_gaps"]
    squares = [(p - g) ** 2 for p, g in zip(predicted, wanted, strict=True)]
    return {
        **pair_metrics(batch, logprobs, beta=1 / eta),
        "reward_gap": statistics.fmean(map(abs, wanted)),
        **({"loss": statistics.fmean(squares)} if loss else {}),
    }
