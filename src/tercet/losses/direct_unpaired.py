"""Losses on single answers that are labelled good or bad, against the policy at the start; one value per answer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Values = tuple[Float[Tensor, " N"], dict[str, Tensor]]


def kto_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    desirable: Float[Tensor, " N"],
    kl: Float[Tensor, " N"],
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Values:
    """KTO, Ethayarajh et al. 2024 (arXiv:2402.01306): how much better than expected, as people feel it.

    Args:
        logprobs: Sums over the answer, of the policy.
        reference_logprobs: Of the policy at the start.
        desirable: 1 for a good answer, 0 for a bad one.
        kl: What the policy's answers diverge by, in nats, at least 0: gains and losses count from there. It is a fact
            of the batch, without gradient.
        beta: Aversion to risk.
        desirable_weight: Of a good answer's gain.
        undesirable_weight: Of a bad answer's loss.
    """
    ratios = logprobs - reference_logprobs
    value = torch.sigmoid(beta * torch.where(desirable > 0.5, ratios - kl, kl - ratios))
    weight = desirable * desirable_weight + (1 - desirable) * undesirable_weight
    return weight * (1 - value), {}


def apo_zero_unpaired_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    desirable: Float[Tensor, " N"],
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Values:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266), one answer at a time: KTO with a divergence of 0."""
    return kto_loss(
        logprobs,
        reference_logprobs=reference_logprobs,
        desirable=desirable,
        kl=torch.zeros_like(logprobs),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
