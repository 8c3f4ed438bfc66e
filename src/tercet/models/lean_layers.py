"""Norm and gate of Llama-like layers as one operation each, where transformers' modules take several.

They keep less for the gradient (of the gate two tensors instead of three, of a norm its input instead of a float32 copy
of it) and pass over it less often on the way back. Only the way through frozen layers is computed: their weights have
no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tercet.models.frozen_llama import gates_with_silu, is_llama_layer


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean x² + eps) (RMSNorm, arXiv:1910.07467), in float32 or finer; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        rate = torch.rsqrt(torch.linalg.vector_norm(precise, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rate)
        return (precise * rate).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rate = ctx.saved_tensors
        # grad x = r (g w - x r² mean(g w x))
        grad, precise = (grads[0] * weight).to(rate.dtype), x.to(rate.dtype)
        along = (grad * precise).mean(-1, keepdim=True) * rate.square()
        return grad.addcmul_(precise, along, value=-1).mul_(rate).to(x.dtype), None, None


class _Gate(torch.autograd.Function):
    """y = silu(gate) up (SwiGLU, arXiv:2002.05202); the activation is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grad_up


def slim(model: nn.Module) -> None:
    """Let the layers that are known compute so; what is not as expected stays as transformers has it."""
    for layer in model.modules():
        if not is_llama_layer(layer):
            continue
        untyped: Any = layer
        for norm in (untyped.input_layernorm, untyped.post_attention_layernorm):
            if type(norm).__name__.endswith("RMSNorm") and "forward" not in norm.__dict__:
                norm.forward = _norm_of(norm)
        mlp = untyped.mlp
        if gates_with_silu(mlp) and "forward" not in mlp.__dict__:
            mlp.forward = _mlp_of(mlp)


def _norm_of(norm: Any) -> Any:
    plain = norm.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = plain(x) if norm.weight.requires_grad else _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
        return out

    return forward


def _mlp_of(mlp: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = mlp.down_proj(_Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-untyped-call]
        return out

    return forward
