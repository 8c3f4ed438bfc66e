"""A scalar model of reward: it gives an answer one number, higher for the answer people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.preference_model import judged
from tercet.algorithms.steps import PairsConfig, rows_of_step, train
from tercet.chat.answers import AnswerRenderer
from tercet.engine.base import Trainer
from tercet.errors import ConfigError
from tercet.rewards.scalar import ScalarJudge
from tercet.runs.run import Run
from tercet.types import Batch, Comparison, Conversation, Datum, StepResult

Group = tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(PairsConfig):
    """The second stage with a scalar model."""

    max_length: int = 1024
    """Longest conversation with its answer in tokens; longer ones lose the beginning of the conversation."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises to its peak."""
    pairs_per_step: int = 8
    """Comparisons per optimizer step; with k_wise, prompts."""
    k_wise: bool = False
    """Learn all comparisons of a prompt in one step, where their mean counts as much as one (InstructGPT); an answer
    that is in several of them is computed once."""
    center: float = 0.01
    """Weight of (chosen + rejected)^2, which keeps scores around 0; 0 leaves them where they are."""
    label_smoothing: float = 0.0
    """Share of the labels that is taken to be the wrong way round; from 0 to below 0.5."""
    head_init_std: float | None = None
    """Standard deviation of the head's first weights; null is 1 / sqrt(D + 1) for hidden states of width D."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it is a share, from 0 to below 0.5")
        if self.center < 0:
            raise ConfigError(f"center is {self.center}; it must be 0 or above (0.01 is usual)")


def reward_model(
    config: RewardModelConfig,
    data: Sequence[Group],
    held_out: Sequence[Comparison],
    renderer: AnswerRenderer,
    *,
    trainer: Trainer,
    run: Run,
    seed: int,
) -> None:
    """Learn to score the better answer higher, from wherever the run stands.

    Args:
        config: How.
        data: Decided comparisons, those that count as one together; see `grouped`.
        held_out: What accuracy and calibration are measured on.
        renderer: How an answer is shown.
        trainer: What learns; it has a head.
        run: Where it is written down; its total steps are `config.steps(len(data))`.
        seed: Of the order.
    """

    def batch_of(step: int) -> Batch:
        return pair_batch(rows_of_step(data, step, config.pairs_per_step, epochs=config.epochs, seed=seed), renderer)

    train(
        batch_of,
        config,
        steps=config.steps(len(data)),
        trainer=trainer,
        run=run,
        evaluate=lambda: judged(ScalarJudge(trainer.scorer(), renderer), held_out, run),
        eval_every_steps=config.eval_every_steps,
        loss="bradley_terry",
        settings={"center": config.center, "label_smoothing": config.label_smoothing},
        measure=score_metrics,
    )


def grouped(comparisons: Sequence[Comparison], *, k_wise: bool) -> list[Group]:
    """Comparisons that are learned together and count as one: those of one prompt, or each by itself."""
    if not k_wise:
        return [(comparison,) for comparison in comparisons]
    found: dict[Conversation, list[Comparison]] = {}
    for comparison in comparisons:
        found.setdefault(comparison.prompt, []).append(comparison)
    return [tuple(group) for group in found.values()]


def pair_batch(groups: Sequence[Group], renderer: AnswerRenderer) -> Batch:
    """The answers of all comparisons, scored at their last tokens; an answer that is in several is one sequence."""
    rows = [(group, comparison) for group in groups for comparison in group]
    tokens = [[renderer.tokens(c.prompt, answer) for answer in (c.chosen, c.rejected)] for _, c in rows]
    places = {each: i for i, each in enumerate(dict.fromkeys(each for pair in tokens for each in pair))}
    return Batch(
        [Datum(each, [0.0] * len(each)) for each in places],
        [(places[chosen], places[rejected]) for chosen, rejected in tokens],
        [1 / len(group) for group, _ in rows],
        {"margins": [comparison.margin for _, comparison in rows]},
    )


def score_metrics(batch: Batch, result: StepResult) -> dict[str, float]:
    """Before they were learned: how often the better answer scored higher, by how much, and the mean score."""
    return {key: result.metrics[key] for key in ("accuracy", "score_gap", "score")}
