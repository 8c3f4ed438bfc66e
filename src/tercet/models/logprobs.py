"""Log-probs of chosen tokens from hidden states, without ever holding [tokens, vocabulary] whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tercet.models.cpu import linear
from tercet.models.memory import CHUNK_TOKENS
from tercet.models.padded import OwnHead
from tercet.models.widening import widens

# So many of them pass through the softmax together: their logits stay in a CPU's cache from step to step.
CACHED_ROWS = 8


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    head: nn.Linear | OwnHead,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-prob of each target, and the entropy of its distribution, in float32.

    Logits are made float32 (float64 ones stay so) before they are divided by the temperature. A temperature of 0 stands
    for greedy sampling, whose log-probs are those of temperature 1.

    Args:
        hidden: Last hidden states, one per token to predict.
        targets: The tokens that followed.
        head: The language-model head.
        temperature: Sampling temperature.
        entropy_gradient: Whether the entropy is learned from; without, it is a plain number.
    """
    divisor = temperature if temperature > 0 else 1.0
    head_learns = any(p.requires_grad for p in head.parameters())
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_learns):
        with torch.no_grad():
            logits = logits_of(head, hidden.device)
            parts = [
                _distribution(few, of, divisor, None)
                for h, t in _chunks(hidden, targets)
                for few, of in _cached(logits(h), t)
            ]
    elif type(head) is nn.Linear and not head_learns:
        out: tuple[Tensor, Tensor] = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head, divisor, entropy_gradient
        )
        return out
    else:
        parts = [
            checkpoint(_chunk, h, t, head, divisor, entropy_gradient, use_reentrant=False)
            for h, t in _chunks(hidden, targets)
        ]
    if not parts:
        return _precise(hidden.new_zeros(0)), _precise(hidden.new_zeros(0))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _chunks(hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    if len(targets) == 0:
        return []
    return list(zip(torch.split(hidden, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS), strict=True))


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunk(
    hidden: Tensor, targets: Tensor, head: nn.Linear | OwnHead, divisor: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logits = logits_of(head, hidden.device)(hidden) / divisor
    log_total = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_total
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        probabilities = torch.exp(logits - log_total[:, None])
        entropy = log_total - (probabilities * logits).sum(-1)
    return logprobs, entropy


def logits_of(head: nn.Linear | OwnHead, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes logits (n, V) of hidden states (n, D), in float32 or finer, that nobody else holds.

    Logits near 20 rounded to 8 bits are off by 0.06, which is more than two answers often differ in. So a bfloat16 head
    multiplies in float32 on a CPU, from a copy made once for all chunks; on CUDA torch gives the product of numbers in
    half precision in float32, but not its gradient, for which it is the copy there too.
    """
    if type(head) is not nn.Linear:
        return lambda hidden: _precise(head(hidden))
    multiply = functional.linear if torch.is_grad_enabled() else linear
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    half = widens(weight.dtype, device)
    if half and not torch.is_grad_enabled():
        return lambda hidden: _half_product(hidden.to(weight.dtype), weight, bias)
    if half or (weight.dtype == torch.bfloat16 and device.type == "cpu"):
        weight, bias = weight.float(), None if bias is None else bias.float()
    return lambda hidden: _precise(multiply(hidden.to(weight.dtype), weight, bias))


def _half_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in float32 of hidden states, weight and bias in half precision."""
    logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


def _cached(logits: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of few rows each, which stay in a CPU's cache from one operation to the next; elsewhere of all rows."""
    rows = CACHED_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    return list(zip(torch.split(logits, rows), torch.split(targets, rows), strict=True))


def _distribution(logits: Tensor, targets: Tensor, divisor: float, surprise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probs of targets (n,) and entropies (n,); logits (n, V) become probabilities, in place.

    `surprise`, where given, becomes p (log p + entropy).
    """
    if divisor != 1:
        logits.div_(divisor)
    highest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None])[:, 0] - highest[:, 0]
    logits.sub_(highest)
    probabilities = torch.exp(logits)
    total = probabilities.sum(-1, keepdim=True)
    probabilities.div_(total)
    log_total = total.log()
    # Not a dot product of BLAS, whose order of summing may hang on how many threads are free.
    entropy = log_total - (probabilities * logits).sum(-1, keepdim=True)
    if surprise is not None:
        torch.mul(logits.sub_(log_total - entropy), probabilities, out=surprise)
    logits.copy_(probabilities)
    return chosen - log_total[:, 0], entropy[:, 0]


class _FrozenHead(torch.autograd.Function):
    """The gradient of each log-prob with respect to its hidden state, found while the logits are at hand.

    A log-prob is one number, so its gradient is one vector a token: W[target] minus the mean of W under the
    distribution. Keeping that vector spares both the logits and a second pass through the head. An entropy that is
    learned from costs one more vector: minus the sum of p (log p + entropy) W.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, divisor: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        nothing = _precise(hidden.new_zeros(0))
        logprobs, entropies = [nothing], [nothing]
        directions, entropy_directions = [hidden.new_zeros(0, hidden.shape[1])], [hidden.new_zeros(0, hidden.shape[1])]
        multiply = logits_of(head, hidden.device)
        for h, t in _chunks(hidden, targets):
            logits = multiply(h)
            surprise = torch.empty_like(logits) if entropy_gradient else None
            pieces = _cached(logits, t)
            surprises = [None] * len(pieces) if surprise is None else [few for few, _ in _cached(surprise, t)]
            for (few, of), into in zip(pieces, surprises, strict=True):
                said = _distribution(few, of, divisor, into)
                logprobs.append(said[0])
                entropies.append(said[1])
            mean = linear(logits.to(head.weight.dtype), head.weight.T)
            directions.append((head.weight[t] - mean) / divisor)
            if surprise is not None:
                entropy_directions.append(linear(surprise.to(head.weight.dtype), head.weight.T) / -divisor)
        entropy = torch.cat(entropies)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(torch.cat(directions), torch.cat(entropy_directions))
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        directions, entropy_directions = ctx.saved_tensors
        grad = grads[0][:, None].to(directions.dtype) * directions
        if len(entropy_directions):
            grad = grad + grads[1][:, None].to(directions.dtype) * entropy_directions
        return grad, None, None, None, None
