"""Losses on the likelihood of given text."""

from jaxtyping import Float
from torch import Tensor


def cross_entropy_loss(logprobs: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
    """Negative log-likelihood of each token, in nats."""
    return -logprobs, {}
