"""Two answers to one prompt as what is learned: tokens, reference log-probs, and the figures everybody watches."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tercet.types import Batch, Datum


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected answer, each behind its prompt; weights are 1 on the answer, stop included."""

    chosen: Datum
    rejected: Datum
    reward_gap: float = 0.0
    """How much more reward the chosen answer has."""

    @property
    def data(self) -> tuple[Datum, Datum]:
        """Both, the chosen one first."""
        return self.chosen, self.rejected


def with_stream(datum: Datum, name: str, values: Sequence[float]) -> Datum:
    """The same sequence with one more stream."""
    return replace(datum, streams={**datum.streams, name: values})


def with_fact(datum: Datum, name: str, value: float) -> Datum:
    """The same sequence with a fact of the whole row, on its last learned token: a loss per row finds it by summing."""
    last = max(t for t, weight in enumerate(datum.weights) if weight)
    return with_stream(datum, name, [value / datum.weights[t] if t == last else 0.0 for t in range(len(datum.tokens))])


def with_reference(pairs: Sequence[Pair], logprobs: Sequence[Sequence[float]]) -> list[Pair]:
    """Pairs with the reference's log-probs, given for the chosen and rejected answer of each in turn."""
    return [
        replace(
            pair,
            chosen=with_stream(pair.chosen, "reference_logprobs", logprobs[2 * i]),
            rejected=with_stream(pair.rejected, "reference_logprobs", logprobs[2 * i + 1]),
        )
        for i, pair in enumerate(pairs)
    ]


def pairs_batch(pairs: Sequence[Pair]) -> Batch:
    """A batch for any loss of pairs."""
    # One number for all pairs: a sum over it, averaged over pairs, is the mean over the tokens of the chosen answers.
    length = statistics.fmean(pair.chosen.weight for pair in pairs)
    return Batch(
        [datum for pair in pairs for datum in pair.data],
        [(2 * i, 2 * i + 1) for i in range(len(pairs))],
        pair_streams={
            "mean_chosen_length": [length] * len(pairs),
            "reward_gaps": [pair.reward_gap for pair in pairs],
        },
    )


def weighted_sum(datum: Datum, values: Sequence[float]) -> float:
    """Sum over the learned tokens."""
    return sum(weight * value for weight, value in zip(datum.weights, values, strict=True) if weight)


def pair_metrics(
    batch: Batch, logprobs: Sequence[Sequence[float]], *, beta: float, per_token: bool = False, prefix: str = ""
) -> dict[str, float]:
    """What a policy makes of pairs, under TRL's keys.

    An answer's reward is beta times its log-ratio to the reference; where there is none, beta times its log-prob.

    Args:
        batch: Pairs.
        logprobs: The policy's, position for position.
        beta: Of the loss.
        per_token: Rewards are means per token.
        prefix: Of the keys.
    """
    sums = [weighted_sum(datum, row) for datum, row in zip(batch.data, logprobs, strict=True)]
    rewards = [
        beta * (total - reference_sum(datum)) / (datum.weight if per_token else 1.0)
        for datum, total in zip(batch.data, sums, strict=True)
    ]
    found: Mapping[str, list[float]] = {
        "rewards/chosen": [rewards[c] for c, _ in batch.pairs],
        "rewards/rejected": [rewards[r] for _, r in batch.pairs],
        "rewards/accuracies": [float(rewards[c] > rewards[r]) for c, r in batch.pairs],
        "rewards/margins": [rewards[c] - rewards[r] for c, r in batch.pairs],
        "logps/chosen": [sums[c] for c, _ in batch.pairs],
        "logps/rejected": [sums[r] for _, r in batch.pairs],
    }
    return {prefix + name: statistics.fmean(values) for name, values in found.items()}


def reference_sum(datum: Datum) -> float:
    """The reference's log-prob of an answer; 0 where there is no reference."""
    reference = datum.streams.get("reference_logprobs")
    return 0.0 if reference is None else weighted_sum(datum, reference)
