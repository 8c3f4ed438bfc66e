"""Policy-gradient losses: one value per token. `sampling_logprobs` are the sampler's own, without gradient."""

import torch
from jaxtyping import Float
from torch import Tensor

# A ratio above e^20 is a broken batch, not a signal; the bound keeps it finite so that the metrics can show it.
_MAX_LOG_RATIO = 20.0


def importance_sampling_loss(
    logprobs: Float[Tensor, "B T"],
    *,
    sampling_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """Policy gradient corrected for the sampler: minus ratio times advantage.

    On the sampler's own policy the ratio is 1 and the gradient is REINFORCE's (Williams 1992).
    """
    ratio = _ratio(logprobs, sampling_logprobs)
    return -ratio * advantages, {"ratio": ratio.detach()}


def ppo_loss(
    logprobs: Float[Tensor, "B T"],
    *,
    sampling_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """Schulman et al. 2017 (arXiv:1707.06347), equation 7: the smaller of the plain and the clipped objective.

    Args:
        logprobs: Of the policy being trained.
        sampling_logprobs: Of the policy that sampled.
        advantages: How much better than expected the token's answer was.
        clip_low: The ratio is cut at 1 - clip_low …
        clip_high: … and at 1 + clip_high.
    """
    ratio = _ratio(logprobs, sampling_logprobs)
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    cut = (clipped < plain).to(ratio.dtype)
    return -torch.minimum(plain, clipped), {"ratio": ratio.detach(), "clip_ratio": cut}


def cispo_loss(
    logprobs: Float[Tensor, "B T"],
    *,
    sampling_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    ratio_min: float = 0.0,
    ratio_max: float = 4.0,
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """MiniMax-M1 (arXiv:2506.13585), equation 4: the ratio is a bounded weight without gradient; no token is dropped.

    Args:
        logprobs: Of the policy being trained.
        sampling_logprobs: Of the policy that sampled.
        advantages: How much better than expected the token's answer was.
        ratio_min: The weight is at least this …
        ratio_max: … and at most this, which is the bound itself, not one plus it.
    """
    ratio = _ratio(logprobs, sampling_logprobs).detach()
    bounded = ratio.clamp(ratio_min, ratio_max)
    return -bounded * logprobs * advantages, {"ratio": ratio, "clip_ratio": (bounded != ratio).to(ratio.dtype)}


def _ratio(logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    return (logprobs - sampling_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
