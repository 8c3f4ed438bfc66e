"""Learning from pairs of answers without sampling: DPO and its family."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.pairs import Pair, pair_metrics, pairs_batch
from tercet.algorithms.steps import PairsConfig, rows_of_step, train
from tercet.engine.base import Trainer
from tercet.errors import ConfigError
from tercet.runs.run import Run
from tercet.types import Batch, StepResult


@dataclass(frozen=True)
class Objective:
    """A loss of the table with its settings."""

    loss: str
    settings: dict[str, float]
    beta: float
    needs_reference: bool
    per_token: bool
    """Whether an answer counts by its mean log-prob per token, and has no reference."""


@dataclass(frozen=True, kw_only=True)
class DirectConfig(PairsConfig):
    """Learning from pairs without sampling."""

    loss: str = "sigmoid"
    """sigmoid, robust, hinge, ipo, ipo_mean, exo, nca, bco, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop,
    sigmoid_norm, simpo, orpo, cpo; or a weighted sum, as 0.8*sigmoid+0.2*bco+sft."""
    beta: float | None = None
    """Pull towards the reference, per nat of log-ratio; null takes the loss's own (0.1; simpo 2)."""
    label_smoothing: float | None = None
    """Share of the labels that are taken to be wrong (sigmoid, sigmoid_norm, robust, exo, aot, simpo, cpo)."""
    gamma: float | None = None
    """Margin of simpo, in its reward (the paper's ratio times beta)."""
    tau: float | None = None
    """How softly discopop passes from one loss to the other; below 1."""
    nll_weight: float | None = None
    """Weight of the chosen answers' likelihood in cpo."""
    shift: float | None = None
    """Where bco draws the line between good and bad."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its peak."""
    pairs_per_step: int = 8
    """Comparisons per optimizer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = (
            ("beta", self.beta, self.beta is None or self.beta > 0, "above 0 (0.1 is usual)"),
            ("tau", self.tau, self.tau is None or 0 < self.tau < 1, "above 0 and below 1 (0.05 is usual)"),
            ("nll_weight", self.nll_weight, self.nll_weight is None or self.nll_weight >= 0, "0 or above"),
            ("label_smoothing", self.label_smoothing, 0 <= (self.label_smoothing or 0) < 0.5, "from 0 to below 0.5"),
        )
        for name, value, fine, wanted in limits:
            if not fine:
                raise ConfigError(f"{name} is {value}; it must be {wanted}")

    def objective(self) -> Objective:
        """The loss and what it is given.

        Raises:
            ConfigError: There is no such loss, or it lacks a setting that is given.
        """
        from tercet.losses import LOSSES

        losses = {name: loss for name, loss in LOSSES.items() if loss.per == "pair" and "logprobs" in loss.inputs
                  and "reward_gaps" not in loss.pair_streams}  # fmt: skip
        given = {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "gamma": self.gamma,
            "tau": self.tau,
            "nll_weight": self.nll_weight,
            "shift": self.shift,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        name, parts = self.loss, {}
        if name not in losses or name == "mixture":
            name, parts = "mixture", self._parts()
        parameters = inspect.signature(losses[name].function).parameters
        for setting in settings:
            if setting not in parameters:
                raise ConfigError(f"the loss {self.loss} has no {setting}; leave it out, or take another loss")
        for part in parts:
            if part not in parameters or parameters[part].default != 0.0:
                alone = ", ".join(sorted(losses.keys() - {"mixture"}))
                mixed = ", ".join(p for p, each in parameters.items() if each.default == 0.0)
                raise ConfigError(
                    f"loss is {self.loss!r}, and there is no loss {part!r}; there are {alone}; and sums, as "
                    f"0.8*sigmoid+0.2*bco+sft, of {mixed}"
                )
        if name == "exo" and self.label_smoothing == 0:
            raise ConfigError("label_smoothing is 0, and exo needs it above 0 (1e-3 is usual)")
        free = "reference_logprobs" not in losses[name].streams
        return Objective(
            name,
            {**settings, **parts},
            settings.get("beta", parameters["beta"].default),
            not free,
            free and "lengths" in losses[name].inputs,
        )

    def _parts(self) -> dict[str, float]:
        """A weighted sum of losses, read: 0.8*sigmoid+sft is {sigmoid: 0.8, sft: 1}."""
        parts: dict[str, float] = {}
        for part in self.loss.replace(" ", "").split("+"):
            weight, star, name = part.rpartition("*")
            try:
                amount = float(weight) if star else 1.0
            except ValueError:
                raise ConfigError(f"loss is {self.loss!r}; a sum is written as 0.8*sigmoid+0.2*bco+sft") from None
            if name in parts:
                raise ConfigError(f"loss is {self.loss!r}, which names {name} twice")
            parts[name] = amount
        return parts


def direct(
    config: DirectConfig, pairs: Sequence[Pair], held_out: Sequence[Pair], *, trainer: Trainer, run: Run, seed: int
) -> None:
    """Learn the pairs, from wherever the run stands.

    Args:
        config: How.
        pairs: With the reference's log-probs, where the loss wants them.
        held_out: What accuracy and margins are measured on.
        trainer: What learns.
        run: Where it is written down; its total steps are `config.steps(len(pairs))`.
        seed: Of the order.
    """
    objective = config.objective()

    def batch_of(step: int) -> Batch:
        return pairs_batch(rows_of_step(pairs, step, config.pairs_per_step, epochs=config.epochs, seed=seed))

    def measure(batch: Batch, result: StepResult) -> dict[str, float]:
        told = pair_metrics(batch, result.logprobs, beta=objective.beta, per_token=objective.per_token)
        return {**result.metrics, **told}

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        batch = pairs_batch(held_out)
        found = trainer.forward(batch).result().logprobs
        return pair_metrics(batch, found, beta=objective.beta, per_token=objective.per_token, prefix="test/")

    train(
        batch_of,
        config,
        steps=config.steps(len(pairs)),
        trainer=trainer,
        run=run,
        evaluate=evaluate,
        eval_every_steps=config.eval_every_steps,
        loss=objective.loss,
        settings=objective.settings,
        measure=measure,
    )
