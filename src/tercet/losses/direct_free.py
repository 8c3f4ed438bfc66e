"""Losses on pairs of answers without a reference policy. In the formulas s is a sum of log-probs, a its mean per token.

`mean_chosen_length` is the mean number of learned tokens of the batch's chosen answers, the same for every pair: a sum
over it, averaged over pairs, is the mean over all tokens of the chosen answers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from tercet.losses.direct import Values, smoothed

# The likeliest an answer can be, in nats per token, that its odds are finite.
_MAX_MEAN_LOGPROB = -1e-12


def simpo_loss(
    logprobs: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    *,
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Values:
    """SimPO, Meng et al. 2024 (arXiv:2405.14734), equation 6: -log sigmoid(beta (a_c - a_r) - gamma).

    `gamma` is the margin itself, not its ratio to beta.
    """
    means = logprobs / lengths
    return smoothed(beta * (means[chosen] - means[rejected]) - gamma, label_smoothing), {}


def cpo_loss(
    logprobs: Float[Tensor, " N"],
    *,
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    mean_chosen_length: Float[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Values:
    """CPO, Xu et al. 2024 (arXiv:2401.08417), equation 5: -log sigmoid(beta (s_c - s_r)), and the chosen answers'
    negative log-likelihood per token."""
    nll = -logprobs[chosen] / mean_chosen_length
    ranked = smoothed(beta * (logprobs[chosen] - logprobs[rejected]), label_smoothing)
    return ranked + nll_weight * nll, {"nll_loss": nll.detach()}


def orpo_loss(
    logprobs: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    *,
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    mean_chosen_length: Float[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """ORPO, Hong et al. 2024 (arXiv:2403.07691), equation 6: the chosen answers' negative log-likelihood per token, and
    beta times -log sigmoid of the log of the odds ratio; the odds of an answer are those of its mean token."""
    odds = _log_odds(logprobs / lengths)
    gap = odds[chosen] - odds[rejected]
    ratio = logsigmoid(gap)
    nll = -logprobs[chosen] / mean_chosen_length
    return nll - beta * ratio, {
        "nll_loss": nll.detach(),
        "log_odds_chosen": gap.detach(),
        "log_odds_ratio": ratio.detach(),
    }


def sft_loss(
    logprobs: Float[Tensor, " N"], *, chosen: Int[Tensor, " P"], mean_chosen_length: Float[Tensor, " P"]
) -> Values:
    """Negative log-likelihood of the chosen answers per token; for mixtures."""
    return -logprobs[chosen] / mean_chosen_length, {}


def _log_odds(means: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log(p / (1 - p)) of p = exp(mean). The two forms of log(1 - p) are each exact on one side of 1/2; the one that is
    not taken is fed a harmless number, for its gradient would spoil the other's."""
    means = means.clamp(max=_MAX_MEAN_LOGPROB)
    near_one = means > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near_one, means, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_one, -1.0, means)))
    return means - torch.where(near_one, small, large)
