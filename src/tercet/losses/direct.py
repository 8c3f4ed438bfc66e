"""Losses on pairs of answers, each against the policy at the start: what a policy learns without sampling.

Every function is given log-probs summed over an answer, its end included, and gives one value per pair. In the formulas
c and r are the log-ratios of the chosen and the rejected answer, policy over reference, and d = c - r.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

Values = tuple[Float[Tensor, " P"], dict[str, Tensor]]


def log_ratios(
    logprobs: Float[Tensor, " N"],
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """How much likelier the policy finds each pair's chosen and rejected answer than the reference does, in nats."""
    ratios = logprobs - reference_logprobs
    return ratios[chosen], ratios[rejected]


def smoothed(z: Float[Tensor, " P"], label_smoothing: float) -> Float[Tensor, " P"]:
    """Cross-entropy of a verdict with logit z that is wrong with probability `label_smoothing`."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def sigmoid_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Values:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), equation 7: -log sigmoid(beta d).

    With `label_smoothing` it is their conservative form, for labels that are wrong that often.
    """
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return smoothed(beta * (c - r), label_smoothing), {}


def robust_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Values:
    """Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409): DPO's expectation is unmoved by labels that
    are wrong with probability `label_smoothing`, which is below 0.5."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    z = beta * (c - r)
    flipped = label_smoothing * logsigmoid(-z) - (1 - label_smoothing) * logsigmoid(z)
    return flipped / (1 - 2 * label_smoothing), {}


def hinge_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """SLiC, Zhao et al. 2023 (arXiv:2305.10425), on log-ratios: max(0, 1 - beta d). The margin in nats is 1 / beta."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return relu(1 - beta * (c - r)), {}


def ipo_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """IPO, Azar et al. 2023 (arXiv:2310.12036), equation 17: (d - 1 / (2 beta))^2, on sums over the answer."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return (c - r - 1 / (2 * beta)) ** 2, {}


def ipo_mean_loss(
    logprobs: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """IPO on means per token, as TRL has it: (c / n_c - r / n_r - 1 / (2 beta))^2."""
    c, r = log_ratios(logprobs / lengths, reference_logprobs / lengths, chosen, rejected)
    return (c - r - 1 / (2 * beta)) ** 2, {}


def sigmoid_norm_loss(
    logprobs: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Values:
    """DPO on means per token, Lambert et al. 2024 (Tülu 3, arXiv:2411.15124)."""
    c, r = log_ratios(logprobs / lengths, reference_logprobs / lengths, chosen, rejected)
    return smoothed(beta * (c - r), label_smoothing), {}


def exo_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Values:
    """EXO, Ji et al. 2024 (arXiv:2402.00856): the reverse KL between the policy's verdict and the label,
    which is wrong with probability `label_smoothing`, above 0."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    z = beta * (c - r)
    right = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-z) * (logsigmoid(-z) - math.log(label_smoothing))
    return right + wrong, {}


def nca_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """NCA, Chen et al. 2024 (arXiv:2402.05369), for pairs: both answers are told from noise, so the chosen one's own
    likelihood does not fall."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r), {}


def bco_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    shift: float = 0.0,
) -> Values:
    """BCO, Jung et al. 2024 (arXiv:2404.04656): a classifier of good and bad answers, whose logit is beta times the
    log-ratio less `shift`."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return -logsigmoid(beta * c - shift) - logsigmoid(shift - beta * r), {}


def sppo_hard_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """SPPO, Wu et al. 2024 (arXiv:2405.00675), where the chosen answer wins surely: log-ratios of
    1 / (2 beta) and minus that."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2, {}


def aot_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Values:
    """AOT for pairs, Melnyk et al. 2024 (arXiv:2406.05882): the policy's gaps between chosen and rejected
    exceed the reference's as distributions, smallest against smallest. Values are in the order of size."""
    ours = (logprobs[chosen] - logprobs[rejected]).sort().values
    theirs = (reference_logprobs[chosen] - reference_logprobs[rejected]).sort().values
    return smoothed(beta * (ours - theirs), label_smoothing), {}


def aot_unpaired_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Values:
    """AOT without pairs, the same: chosen log-ratios exceed rejected ones as distributions. Values are in
    the order of size."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return smoothed(beta * (c.sort().values - r.sort().values), label_smoothing), {}


def apo_zero_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266): chosen answers rise, rejected ones fall; for
    answers that are better than the policy's own."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r), {}


def apo_down_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
) -> Values:
    """APO-down, the same, equation 8 plus 1: both fall, rejected answers faster; for answers that are worse than the
    policy's own."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    return torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)), {}


def discopop_loss(
    logprobs: Float[Tensor, " N"],
    *,
    reference_logprobs: Float[Tensor, " N"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    beta: float = 0.1,
    tau: float = 0.05,
) -> Values:
    """DiscoPOP, Lu et al. 2024 (arXiv:2406.08414): with z = beta d, from logistic to exponential loss as z
    passes 0, the faster the smaller `tau`, which is below 1."""
    c, r = log_ratios(logprobs, reference_logprobs, chosen, rejected)
    z = beta * (c - r)
    # The product of exp(-z) and sigmoid(z / tau) as one exponential: by itself exp(-z) overflows.
    return -logsigmoid(z) * torch.sigmoid(-z / tau) + torch.exp(logsigmoid(z / tau) - z), {}
