"""A win rate as it would be if both answers were equally long (Dubois et al. 2024, arXiv:2404.04475; AlpacaEval 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
STRENGTHS = tuple(math.pow(10, -4 + 8 * i / 9) for i in range(10))
"""The weights of the data against the penalty that cross-validation chooses from, those of scikit-learn."""
FOLDS = 5


@dataclass(frozen=True)
class LengthControlled:
    """What the fitted model says of answers of equal length."""

    win_rate: float
    stderr: float
    """Of the fitted model, by the sandwich (White 1982); the penalty is not counted."""
    skill: float
    """theta, in logits: how much better the policy is where lengths are equal."""
    length: float
    """phi: what the judge gives for the baseline being longer; below 0 it likes length."""
    n: int

    def metrics(self) -> dict[str, float]:
        """Under the keys of what `tercet eval` finds."""
        return {"lc_win_rate": self.win_rate, "lc_stderr": self.stderr}


def length_controlled(
    preferences: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    difficulty: Sequence[float] | None = None,
) -> LengthControlled:
    """Fit the published model and predict with the difference of lengths set to 0.

    ::

        logit P(policy wins) = theta + phi tanh(d / std(d)) + psi difficulty,  d = len(baseline) - len(policy)

    It is fitted by logistic regression with an L1 penalty, whose strength five-fold cross-validation chooses. This is
    the published form without the pull towards gamed baselines, whose data belong to AlpacaEval's own 805
    instructions; so do the difficulties, and without them it is AlpacaEval's `length_controlled_minimal`.

    Args:
        preferences: For each prompt the preference for the policy's answer, in [0, 1]; a tie is 0.5.
        lengths: The policy's answers in characters.
        baseline_lengths: The baseline's.
        difficulty: Of each prompt, where it is known.

    Raises:
        ValueError: There are fewer than two prompts, or not as many of each.
    """
    wins = np.asarray(preferences, dtype=np.float64)
    if len(wins) < 2 or not len(wins) == len(lengths) == len(baseline_lengths):
        raise ValueError(
            f"a length-controlled win rate needs at least 2 prompts, each with two lengths; got {len(wins)}, "
            f"{len(lengths)} and {len(baseline_lengths)}"
        )
    gaps = np.asarray(baseline_lengths, dtype=np.float64) - np.asarray(lengths, dtype=np.float64)
    spread = float(gaps.std(ddof=1))
    # A constant gap says nothing that skill does not; the published code divides by 0 there.
    controlled = np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)
    columns = [np.ones_like(gaps), controlled]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    features = np.stack(columns, axis=1)
    weights = _fit(features, wins, _strength(features, wins))
    equal = features.copy()
    equal[:, 1] = 0.0
    predicted = _sigmoid(equal @ weights)
    return LengthControlled(
        win_rate=float(predicted.mean()),
        stderr=_stderr(features, wins, weights, equal),
        skill=float(weights[0]),
        length=float(weights[1]),
        n=len(wins),
    )


def _strength(features: Array, wins: Array) -> float:
    """The strength under which held-out prompts are predicted best; the weakest data's where several are."""
    n = len(wins)
    # Groups of one size are dealt out from the last to the first, as scikit-learn's GroupKFold does.
    fold = np.arange(n)[::-1] % min(FOLDS, n)
    costs = []
    for strength in STRENGTHS:
        parts = []
        for part in range(min(FOLDS, n)):
            held = fold == part
            p = np.clip(_sigmoid(features[held] @ _fit(features[~held], wins[~held], strength)), 1e-15, 1 - 1e-15)
            parts.append(float(-np.mean(wins[held] * np.log(p) + (1 - wins[held]) * np.log(1 - p))))
        costs.append(math.fsum(parts))
    return STRENGTHS[int(np.argmin(costs))]


def _fit(features: Array, wins: Array, strength: float) -> Array:
    """Minimise |w|_1 + strength sum_i cross-entropy(wins_i, sigmoid(x_i w)), by Newton steps on the smooth part."""
    weights = np.zeros(features.shape[1])
    cost = _cost(features, wins, weights, strength)
    for _ in range(200):
        p = _sigmoid(features @ weights)
        slope = strength * features.T @ (p - wins)
        # The ridge only keeps a direction that nothing depends on from dividing by 0.
        curve = strength * (features.T * (p * (1 - p))) @ features + 1e-12 * np.eye(len(weights))
        step = _penalised_step(weights, slope, curve)
        scale = 1.0
        while scale > 1e-12 and _cost(features, wins, weights + scale * step, strength) > cost:
            scale /= 2
        weights = weights + scale * step
        before, cost = cost, _cost(features, wins, weights, strength)
        if np.abs(scale * step).max() < 1e-12 or before - cost <= 1e-15 * abs(cost):
            break
    return weights


def _penalised_step(weights: Array, slope: Array, curve: Array) -> Array:
    """Minimise slope d + d curve d / 2 + |weights + d|_1, one coordinate after the other."""
    step = np.zeros_like(weights)
    for _ in range(1000):
        largest = 0.0
        for j in range(len(weights)):
            pull = slope[j] + curve[j] @ step
            wanted = weights[j] + step[j] - pull / curve[j, j]
            shrunk = math.copysign(max(abs(wanted) - 1 / curve[j, j], 0.0), wanted)
            change = shrunk - weights[j] - step[j]
            step[j] += change
            largest = max(largest, abs(change))
        if largest < 1e-13:
            break
    return step


def _cost(features: Array, wins: Array, weights: Array, strength: float) -> float:
    logits = features @ weights
    return float(np.abs(weights).sum() + strength * np.sum(np.logaddexp(0, logits) - wins * logits))


def _stderr(features: Array, wins: Array, weights: Array, equal: Array) -> float:
    p = _sigmoid(features @ weights)
    bread = np.linalg.pinv((features.T * (p * (1 - p))) @ features)
    filling = (features.T * (wins - p) ** 2) @ features
    q = _sigmoid(equal @ weights)
    gradient = np.mean((q * (1 - q))[:, None] * equal, axis=0)
    return math.sqrt(max(0.0, float(gradient @ bread @ filling @ bread @ gradient)))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))
