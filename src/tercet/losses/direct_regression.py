"""Regression of reward differences on log-ratio differences."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from tercet.losses.direct import Values, log_ratios


def rebel_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    reward_gaps: Float[Tensor, " P"],
    eta: float = 1.0,
) -> Values:
    """REBEL, Gao et al. 2024 (arXiv:2404.16767), algorithm 1, times eta: (d - eta g)^2 / eta.

    The published (d / eta - g)^2 is a metric, `published_loss`. Its gradient is of the size g / eta, which a large eta
    brings down to Adam's epsilon; ours is -2 g times the gradient of d at the start, whatever eta is.

    Args:
        logprobs: Sums over the answer, of the policy, at the temperature at which the answers were drawn.
        reference_logprobs: The same of the policy that drew them.
        chosen: Of each pair one answer …
        rejected: … and the other; which is which only decides the sign of the gap.
        reward_gaps: g, how much more reward the first has than the second.
        eta: How far the policy moves: it ends at the old one times exp(eta times reward), normalised.
    """
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    error = (c - r) - eta * reward_gaps
    return error**2 / eta, {"published_loss": (error / eta).detach() ** 2, "predicted_gap": ((c - r) / eta).detach()}
