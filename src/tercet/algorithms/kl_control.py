"""How far the policy is from its reference, and how strongly it is held back. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

KLPenalty = Literal["kl", "abs", "mse", "k3", "full"]
KLControl = Literal["adaptive", "fixed"]

ESTIMATORS: dict[str, Callable[[float], float]] = {
    "kl": lambda d: d,
    "abs": abs,
    "mse": lambda d: d * d / 2,
    "k3": lambda d: math.exp(min(-d, 20.0)) - 1 + d,
}
"""From a token's log-ratio d = log p - log p_ref to what is charged for it. `full`, the divergence of the two whole
distributions, is no function of d; the sampler gives it."""


def adapted_kl_coef(coef: float, kl: float, rows: int, *, target: float, horizon: float) -> float:
    """The coefficient after a batch (Ziegler et al. 2019, arXiv:1909.08593): up where the KL is above its target.

    Args:
        coef: Before.
        kl: Mean over the batch's answers of the KL summed over their tokens, in nats.
        rows: Answers in the batch.
        target: Wanted KL of an answer, in nats.
        horizon: Answers over which an error of at least 20% changes the coefficient by about 20%.

    >>> round(adapted_kl_coef(0.2, 0.0, 4, target=6.0, horizon=10_000), 6)
    0.199984
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return coef * (1 + error * rows / horizon)
