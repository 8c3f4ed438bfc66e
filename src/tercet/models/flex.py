"""Attention over a packed forest as one kernel, on CUDA (FlexAttention, Dong et al. 2024, arXiv:2412.05496).

Blocks of 128 x 128 tokens that the trie rules out are skipped, and scores are never in memory. Triton compiles the
kernel at its first use. Where that fails, or the kernel gives other numbers, spans are computed one by one as on a CPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tercet.models.out_of_memory import ran_out
from tercet.models.tree_attention import ForestLayout

Kernel = Callable[..., Any]

# How far the kernel may be off, of the largest number there is; bfloat16 has 8 bits.
TOLERANCE = 0.03
# A third of the row that the kernel is tried on: of several blocks, and of fewer than the 128 tokens of one.
LONG, SHORT = 100, 13


@dataclass(frozen=True)
class FlexLayout:
    """Attention of whole sequences, for training and scoring."""

    subtree_end: Tensor
    """(T,) where the range of tokens below each token ends, on the device that computes."""
    spans: Callable[[], ForestLayout]
    """Makes the same attention span by span."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `tercet.models.tree_attention.Layout`."""
        if not works(query.shape[0], key.shape[0], query.shape[2], query.dtype, query.device):
            return self._spans.attend(layer, query, key, value, scale)
        return fused(compiled(), query, key, value, self.mask, scale)

    @cached_property
    def mask(self) -> BlockMask:
        """The same in every layer."""
        return block_mask(self.subtree_end)

    @cached_property
    def _spans(self) -> ForestLayout:
        return self.spans()


def block_mask(subtree_end: Tensor) -> BlockMask:
    """Token t sees token u exactly when u <= t < subtree_end[u]; (T,) there."""

    def sees(batch: Tensor, head: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return (u <= t) & (t < subtree_end[u])

    tokens = len(subtree_end)
    return create_block_mask(sees, None, None, tokens, tokens, device=str(subtree_end.device))


def fused(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Queries (heads, T, d), keys and values (kv_heads, T, d) -> (heads, T, d)."""
    grouped = query.shape[0] != key.shape[0]
    out: Tensor = kernel(query[None], key[None], value[None], block_mask=mask, scale=scale, enable_gqa=grouped)[0]
    return out


@cache
def compiled() -> Kernel:
    """The kernel, compiled for rows of all lengths."""
    from torch._dynamo import config

    # With a gradient or without, short rows, one block of mask or more: each is compiled, and beyond the limit nothing
    # would be fused.
    config.recompile_limit = max(64, config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


@cache
def works(heads: int, kv_heads: int, d: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Try the compiled kernel once, forward and backward, also on a row so short that torch has another kernel for it,
    and on that one without gradient; if it cannot be used, that is said."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            apart = [error_of(compiled(), heads, kv_heads, d, dtype, device, n) for n in (LONG, SHORT)]
        with torch.inference_mode():
            apart.append(error_of(compiled(), heads, kv_heads, d, dtype, device, SHORT))
    except Exception as error:  # Triton, its compiler and the driver raise whatever they like
        if ran_out(error):
            raise  # less is tried at once, with the kernel
        found = f"fails here: {error}"
    else:
        if all(each < TOLERANCE for each in apart):
            return True
        found = f"is off here, by {' and '.join(f'{each:.2g}' for each in apart)} of the largest number"
    warnings.warn(f"FlexAttention {found}; attention is computed span by span instead, slower", stacklevel=2)
    return False


def error_of(
    kernel: Kernel, heads: int, kv_heads: int, d: int, dtype: torch.dtype, device: torch.device, n: int = LONG
) -> float:
    """How far a small trie's output, and its gradients where there are any, are off those of a masked softmax, of the
    largest number in each."""
    # A trunk of n tokens and two branches.
    ends = torch.tensor([3 * n] * n + [2 * n] * n + [3 * n] * n, device=device)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(k, 3 * n, d, generator=draw).to(device, dtype) for k in (heads, kv_heads, kv_heads, heads)]
    found = _with_gradients(lambda q, k, v: fused(kernel, q, k, v, block_mask(ends), d**-0.5), inputs)
    wanted = _with_gradients(lambda q, k, v: _masked_softmax(q, k, v, ends, d**-0.5), [x.double() for x in inputs])
    apart = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    return max(apart) if all(map(math.isfinite, apart)) else math.nan


def _with_gradients(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return [attention(*inputs[:3])]
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def _masked_softmax(query: Tensor, key: Tensor, value: Tensor, subtree_end: Tensor, scale: float) -> Tensor:
    row = torch.arange(len(subtree_end), device=subtree_end.device)
    seen = (row[None, :] <= row[:, None]) & (row[:, None] < subtree_end[None, :])
    key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ value
