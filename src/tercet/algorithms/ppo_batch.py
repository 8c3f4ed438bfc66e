"""What PPO knows of a batch of answers before it learns from it: rewards, advantages and returns of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tercet.algorithms.gae import gae, mean_and_variance, whiten
from tercet.errors import DataError, UsageError
from tercet.types import Datum

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A batch of answers as the policy, its reference and the critic saw them before anything was learned; lists of one
    entry per answer, and of each token of it."""

    queries: list[list[int]]
    responses: list[list[int]]
    scores: list[float]
    logprobs: list[list[float]]
    reference_logprobs: list[list[float]]
    entropies: list[list[float]]
    values: list[list[float]]
    kl: list[list[float]]
    """What each token is charged for, by the estimator in use, in nats."""

    @property
    def mean_kl(self) -> float:
        """Mean over answers of the summed KL."""
        return sum(map(sum, self.kl)) / len(self.kl)

    def token_rewards(self, kl_coef: float) -> list[list[float]]:
        """Minus `kl_coef` x KL on every token, and the score on the last one."""
        rows = [[-kl_coef * each for each in row] for row in self.kl]
        for row, score in zip(rows, self.scores, strict=True):
            row[-1] += score
        return rows


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What policy and critic learn from."""

    advantages: list[list[float]]
    returns: list[list[float]]


def targets(
    rewards: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> Targets:
    """Advantages and returns. The returns are those of the advantages before they are whitened over the whole batch."""
    rows = whiten(rewards, shift=False) if whiten_rewards else rewards
    raw = [gae(r, v, gamma=gamma, lam=lam) for r, v in zip(rows, values, strict=True)]
    returns = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(raw, values, strict=True)]
    return Targets(advantages=whiten(raw) if whiten_advantages else raw, returns=returns)


def response_datum(query: Tokens, response: Tokens, **streams: Sequence[float]) -> Datum:
    """Query and response as one sequence; weights are 1 on the response, and streams are of its tokens."""
    before = [0.0] * len(query)
    return Datum(
        [*query, *response],
        before + [1.0] * len(response),
        {name: [*before, *values] for name, values in streams.items()},
    )


def token_lists(what: str, rows: Sequence[object]) -> list[list[int]]:
    """Token ids given as lists or tensors of shape (n,) or (1, n).

    Raises:
        DataError: One is empty or has another shape.
    """
    found = []
    for i, row in enumerate(rows):
        tokens = row.tolist() if hasattr(row, "tolist") else list(row)  # type: ignore[call-overload]
        if len(tokens) == 1 and isinstance(tokens[0], list | tuple):
            tokens = list(tokens[0])
        if not tokens or not all(isinstance(token, int) for token in tokens):
            raise DataError(f"{what} {i} is {str(row)[:60]}; it must hold token ids, of shape (n,) or (1, n), n >= 1")
        found.append(tokens)
    return found


def check_responses(queries: Sequence[Tokens], responses: Sequence[Tokens]) -> None:
    """Refuse a response that begins with its query: the query would be learned and paid for as if it were sampled.

    Raises:
        UsageError: Names the first.
    """
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        if list(response[: len(query)]) == list(query):
            raise UsageError(
                f"response {i} begins with its query of {len(query)} tokens; give what was generated alone, as "
                "generate(return_prompt=False) does"
            )


def policy_figures(rollouts: Rollouts, targets: Targets, kl_coef: float) -> dict[str, float]:
    """What is known before the batch is learned, under the keys of TRL up to 0.11."""
    scores = mean_and_variance([rollouts.scores])
    lengths = {
        name: mean_and_variance([[float(len(row)) for row in rows]])
        for name, rows in (("queries", rollouts.queries), ("responses", rollouts.responses))
    }
    value, returns = mean_and_variance(rollouts.values), mean_and_variance(targets.returns)
    n = len(rollouts.scores)
    return {
        "objective/kl": rollouts.mean_kl,
        "ppo/kl": rollouts.mean_kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -sum(map(sum, rollouts.logprobs)) / n,
        "ppo/mean_non_score_reward": -kl_coef * mean_and_variance(rollouts.kl)[0],
        "ppo/mean_scores": scores[0],
        "ppo/std_scores": scores[1] ** 0.5,
        "ppo/returns/mean": returns[0],
        "ppo/returns/var": returns[1],
        "ppo/val/mean": value[0],
        "ppo/val/var": value[1],
        "ppo/policy/advantages_mean": mean_and_variance(targets.advantages)[0],
        **{f"tokens/{name}_len_mean": mean for name, (mean, _) in lengths.items()},
        **{f"tokens/{name}_len_std": variance**0.5 for name, (_, variance) in lengths.items()},
    }
