"""Attention over a packed forest of sequences, registered with transformers under the name `tercet`.

A model whose attention goes through transformers' `AttentionInterface` hands queries, keys and values of one packed
row to `forest_attention`; the layout comes along as the keyword `layout`. A token sees itself and its ancestors in the
trie, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tercet.models.widening import widens

NAME = "tercet"


class Layout(Protocol):
    """What knows how the packed row attends."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Queries (heads, T, d), keys and values (kv_heads, T, d) -> (heads, T, d)."""
        ...


@dataclass(frozen=True)
class Span:
    """A range of the row and what it sees: whole ranges before itself, and of itself what the mask allows."""

    start: int
    end: int
    seen: tuple[tuple[int, int], ...]
    """Ranges (start, end) of the row in order; the last one ends with the span itself."""
    bias: Tensor
    """(end - start, end - start): 0 where the trie allows, minus infinity elsewhere."""

    def to(self, device: torch.device) -> Span:
        """The same span on a device."""
        return replace(self, bias=self.bias.to(device))


@dataclass(frozen=True)
class ForestLayout:
    """Attention of whole sequences, for training and scoring."""

    spans: tuple[Span, ...]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Layout`."""
        out: Tensor = _ForestAttention.apply(query, key, value, self.spans, scale)  # type: ignore[no-untyped-call]
        return out


def span(start: int, end: int, ancestors: Sequence[tuple[int, int]], subtree_end: Tensor) -> Span:
    """A span that sees ranges before itself, and itself as `subtree_end` (T,) of the row says."""
    row = torch.arange(start, end)
    inside = (row[None, :] <= row[:, None]) & (row[:, None] < subtree_end[start:end][None, :])
    bias = torch.zeros(inside.shape).masked_fill_(~inside, float("-inf"))
    before = list(ancestors)
    first = before.pop()[0] if before and before[-1][1] == start else start
    return Span(start, end, (*before, (first, end)), bias)


def score_dtype(like: Tensor) -> torch.dtype:
    """What scores of such queries are in: float32 on CUDA, as a score near 20 rounded to 8 bits is off by 0.06."""
    return torch.float32 if widens(like.dtype, like.device) else like.dtype


def scorer(like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What multiplies tensors (N, m, d) and (N, d, n), like this one, into scores."""
    wide = score_dtype(like)
    return torch.bmm if wide == like.dtype else partial(torch.bmm, out_dtype=wide)


class _ForestAttention(torch.autograd.Function):
    """Softmax attention, span by span. The weights are computed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...], scale: float) -> Tensor:
        # Picking rows out of a transposed view would copy the whole of it for every span.
        key, value = key.contiguous(), value.contiguous()
        out = torch.empty_like(query)
        for part in spans:
            q, k, v = _gather(query, key, value, part, scale)
            weights = _weights(q, k, part).to(v.dtype)
            out[:, part.start : part.end] = (weights @ v).reshape(query.shape[0], -1, query.shape[-1])
        ctx.save_for_backward(query, key, value)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        multiply = scorer(query)
        for part in ctx.spans:
            q, k, v = _gather(query, key, value, part, ctx.scale)
            weights = _weights(q, k, part)
            grad_out = grads[0][:, part.start : part.end].reshape(q.shape)
            grad_v = weights.to(v.dtype).transpose(1, 2) @ grad_out
            grad_weights = multiply(grad_out, v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(q.dtype)
            grad_q = (grad_scores @ k).mul_(ctx.scale)
            grad_query[:, part.start : part.end] = grad_q.reshape(query.shape[0], -1, query.shape[-1])
            grad_k = grad_scores.transpose(1, 2) @ q
            at = 0
            for start, end in part.seen:
                grad_key[:, start:end] += grad_k[:, at : at + end - start]
                grad_value[:, start:end] += grad_v[:, at : at + end - start]
                at += end - start
        return grad_query, grad_key, grad_value, None, None


def _gather(query: Tensor, key: Tensor, value: Tensor, part: Span, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries of a span (kv_heads, queries per kv head x tokens, d); keys, values seen (kv_heads, seen, d)."""
    q = (query[:, part.start : part.end] * scale).reshape(key.shape[0], -1, query.shape[-1])
    return q, _seen(key, part), _seen(value, part)


def _seen(kept: Tensor, part: Span) -> Tensor:
    if len(part.seen) == 1:
        return kept[:, slice(*part.seen[0])]
    return torch.cat([kept[:, start:end] for start, end in part.seen], dim=1)


def _weights(q: Tensor, k: Tensor, part: Span) -> Tensor:
    scores = scorer(q)(q, k.transpose(1, 2))
    own = len(part.bias)
    scores.view(k.shape[0], -1, own, k.shape[1])[..., -own:].add_(part.bias)
    return torch.softmax(scores, dim=-1)


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; batch size is 1, the row is packed."""
    if layout is None:
        raise RuntimeError("a model made ready by tercet needs a layout; call it through tercet.engine")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # No fused kernel keeps scores in float32 here, and rounded to 8 bits they are off by as much as 0.06.
        q, k, v = q.float(), k.float(), v.float()
    out = layout.attend(int(getattr(module, "layer_idx")), q, k, v, scale).to(query.dtype)  # noqa: B009
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(NAME, forest_attention)
