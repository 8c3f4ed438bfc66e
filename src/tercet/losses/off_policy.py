"""Policy-gradient losses for samples that the policy has moved away from."""

import torch
from jaxtyping import Float
from torch import Tensor

# As in `policy_gradient`: a ratio above e^20 is a broken batch, and must stay finite to be seen in the metrics.
_MAX_LOG_RATIO = 20.0


def dro_loss(
    logprobs: Float[Tensor, "B T"],
    *,
    sampling_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    beta: float = 0.05,
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """Direct Reward Optimisation (Richemond et al. 2024, arXiv:2405.19107): no ratio, and a square that holds back.

    Args:
        logprobs: Of the policy being trained.
        sampling_logprobs: Of the policy that sampled.
        advantages: How much better than expected the token's answer was.
        beta: Weight of half the squared difference of the log-probs.
    """
    difference = logprobs - sampling_logprobs
    return -(logprobs * advantages - 0.5 * beta * difference**2), {"log_ratio": difference.detach()}


def gspo_loss(
    logprobs: Float[Tensor, "B T"],
    *,
    sampling_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    sequence_ratio_mask: Float[Tensor, "B T"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """Group Sequence Policy Optimisation, its token form (Zheng et al. 2025, arXiv:2507.18071, equation 14).

    Every token has the ratio of its whole sequence, the geometric mean of the tokens'; the gradient is the token's own.

    Args:
        logprobs: Of the policy being trained, a sequence a row.
        sampling_logprobs: Of the policy that sampled.
        advantages: How much better than expected the token's answer was.
        sequence_ratio_mask: 1 for the tokens whose ratios make the sequence's, 0 for the others.
        clip_low: The ratio is cut at 1 - clip_low …
        clip_high: … and at 1 + clip_high.
    """
    log_ratio = (logprobs.detach() - sampling_logprobs) * sequence_ratio_mask
    mean = log_ratio.sum(-1, keepdim=True) / sequence_ratio_mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = (mean.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO) + logprobs - logprobs.detach()).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    cut = (clipped < plain).to(ratio.dtype)
    return -torch.minimum(plain, clipped), {"ratio": ratio.detach(), "clip_ratio": cut}
