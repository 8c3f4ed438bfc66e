"""A weighted sum of losses on pairs, as 0.8 sigmoid + 0.2 bco + 1 sft: MPO, Wang et al. 2024 (arXiv:2411.10442)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from tercet.losses import direct
from tercet.losses.direct import Values
from tercet.losses.direct_free import sft_loss


def mixture_loss(
    logprobs: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    mean_chosen_length: Float[Tensor, " P"],
    beta: float = 0.1,
    sigmoid: float = 0.0,
    hinge: float = 0.0,
    ipo: float = 0.0,
    ipo_mean: float = 0.0,
    sigmoid_norm: float = 0.0,
    robust: float = 0.0,
    exo: float = 0.0,
    nca: float = 0.0,
    bco: float = 0.0,
    sppo_hard: float = 0.0,
    apo_zero: float = 0.0,
    apo_down: float = 0.0,
    discopop: float = 0.0,
    sft: float = 0.0,
) -> Values:
    """The sum of the named losses times their weights; each has the defaults of its own for all but beta.

    Args:
        logprobs: Sums over the answer, of the policy.
        lengths: Learned tokens of each answer.
        reference_logprobs: Of the policy at the start.
        chosen: Of each pair the better answer …
        rejected: … and the worse.
        mean_chosen_length: Mean learned tokens of the batch's chosen answers.
        beta: Of all of them.
        sigmoid, hinge, ipo, ipo_mean, sigmoid_norm, robust, exo, nca, bco, sppo_hard, apo_zero, apo_down, discopop,
            sft: Weights.
    """
    given: dict[str, Any] = {
        "reference_logprobs": reference_logprobs,
        "chosen": chosen,
        "rejected": rejected,
        "beta": beta,
    }
    total = 0 * logprobs[chosen]
    for weight, loss in (
        (sigmoid, direct.sigmoid_loss),
        (hinge, direct.hinge_loss),
        (ipo, direct.ipo_loss),
        (robust, direct.robust_loss),
        (exo, direct.exo_loss),
        (nca, direct.nca_loss),
        (bco, direct.bco_loss),
        (sppo_hard, direct.sppo_hard_loss),
        (apo_zero, direct.apo_zero_loss),
        (apo_down, direct.apo_down_loss),
        (discopop, direct.discopop_loss),
    ):
        if weight:
            total = total + weight * loss(logprobs, **given)[0]
    for weight, averaged in ((ipo_mean, direct.ipo_mean_loss), (sigmoid_norm, direct.sigmoid_norm_loss)):
        if weight:
            total = total + weight * averaged(logprobs, lengths, **given)[0]
    if sft:
        total = total + sft * sft_loss(logprobs, chosen=chosen, mean_chosen_length=mean_chosen_length)[0]
    return total, {}
