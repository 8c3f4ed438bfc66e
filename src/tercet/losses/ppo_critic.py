"""PPO's critic, its policy and critic on one trunk, and the terms that may be added to a policy's loss: one value per
token."""

import torch
from jaxtyping import Float
from torch import Tensor

from tercet.losses.policy_gradient import ppo_loss

# A token's k3 beyond e^20 is a broken batch; the bound keeps its gradient finite.
_MAX_LOG_RATIO = 20.0

Values = tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]


def clipped_value_loss(
    values: Float[Tensor, "B T"],
    *,
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    clip_range_value: float = 0.2,
) -> Values:
    """Half the squared error of the value, or of the value kept near the old one, whichever is larger.

    Args:
        values: Of the critic being trained.
        old_values: Of the critic as it was when the answers were scored.
        returns: What they ought to be.
        clip_range_value: The value may leave the old one by so much.
    """
    kept = old_values + (values - old_values).clamp(-clip_range_value, clip_range_value)
    error, kept_error = (values - returns) ** 2, (kept - returns) ** 2
    metrics = {
        "value": values,
        "value_error": error,
        "value_clip_ratio": (kept_error > error).to(values.dtype),
        "value_loss": torch.maximum(error, kept_error) / 2,
    }
    return torch.maximum(error, kept_error) / 2, {name: each.detach() for name, each in metrics.items()}


def ppo_critic_loss(
    logprobs: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    *,
    sampling_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_range_value: float = 0.2,
    vf_coef: float = 0.1,
) -> Values:
    """Schulman et al. 2017 (arXiv:1707.06347), equation 9: policy and critic on one trunk.

    Args:
        logprobs: Of the policy being trained.
        values: Of its value head.
        sampling_logprobs: Of the policy that sampled.
        advantages: How much better than expected each token was.
        old_values: See `clipped_value_loss`.
        returns: See `clipped_value_loss`.
        clip_low: See `ppo_loss`.
        clip_high: See `ppo_loss`.
        clip_range_value: See `clipped_value_loss`.
        vf_coef: Weight of the critic's loss.
    """
    policy, metrics = ppo_loss(
        logprobs, sampling_logprobs=sampling_logprobs, advantages=advantages, clip_low=clip_low, clip_high=clip_high
    )
    critic, value_metrics = clipped_value_loss(
        values, old_values=old_values, returns=returns, clip_range_value=clip_range_value
    )
    return policy + vf_coef * critic, {**metrics, **value_metrics, "policy_loss": policy.detach()}


def entropy_bonus(entropies: Float[Tensor, "B T"], *, coef: float = 1.0) -> Values:
    """Minus the entropy of each token's distribution, which keeps a policy from settling too early."""
    return -coef * entropies, {}


def kl_term(logprobs: Float[Tensor, "B T"], *, reference_logprobs: Float[Tensor, "B T"], coef: float = 1.0) -> Values:
    """The log-ratio (k1). Its expected gradient is zero: as a term of a loss it holds nothing back."""
    ratio = logprobs - reference_logprobs
    return coef * ratio, {"kl_term": ratio.detach()}


def abs_kl_term(
    logprobs: Float[Tensor, "B T"], *, reference_logprobs: Float[Tensor, "B T"], coef: float = 1.0
) -> Values:
    """The distance of the log-probs. Its gradient is the ratio's sign, however far they are apart."""
    distance = (logprobs - reference_logprobs).abs()
    return coef * distance, {"kl_term": distance.detach()}


def mse_kl_term(
    logprobs: Float[Tensor, "B T"], *, reference_logprobs: Float[Tensor, "B T"], coef: float = 1.0
) -> Values:
    """Half the squared log-ratio (k2). Its expected gradient is that of each token's KL to the reference."""
    square = (logprobs - reference_logprobs) ** 2 / 2
    return coef * square, {"kl_term": square.detach()}


def k3_term(logprobs: Float[Tensor, "B T"], *, reference_logprobs: Float[Tensor, "B T"], coef: float = 1.0) -> Values:
    """e^-d - 1 + d of the log-ratio d. Its expected gradient is that of the reference's KL to the policy."""
    ratio = (logprobs - reference_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    term = (-ratio).exp() - 1 + ratio
    return coef * term, {"kl_term": term.detach()}
