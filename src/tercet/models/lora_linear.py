"""One operation for a linear layer with a low-rank adapter, where peft's own takes six.

peft adds `lora_B(lora_A(x)) * scaling` to the frozen layer's output: three passes over an output-sized tensor forward
and two backward, and more kept for the gradient. Here the update is accumulated into the output in place, and only the
input and its projection are kept. Shapes: x (…, in), W (out, in), A (rank, in), B (out, rank).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from tercet.models.cpu import linear


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + scale (x A') B', with gradients for x, A and B only: W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = linear(rows, weight, bias)
        down = linear(rows, a.to(rows.dtype))
        out.addmm_(down, b.to(rows.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, down)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, a, b, down = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_down = linear(grad, b.to(grad.dtype).T).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.T).addmm_(grad_down, a.to(grad.dtype)).view(ctx.shape)
        # The narrow matrix first: the same product many times as fast.
        grad_a = linear(grad_down.T, rows.T)
        grad_b = linear(down.T, grad.T).mul_(ctx.scale).T
        return grad_x, None, None, grad_a.to(a.dtype), grad_b.to(b.dtype), None


def fuse(model: nn.Module) -> None:
    """Let peft's plain linear adapters compute in one operation; other kinds stay as peft has them."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear and "forward" not in module.__dict__:
            module.forward = _forward_of(module)  # type: ignore[method-assign]


def _forward_of(layer: PeftLinear) -> Any:
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        simple = len(active) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
        if not simple or active[0] in layer.lora_variant or layer.base_layer.weight.requires_grad:
            out: Tensor = plain(x, *args, **kwargs)
            return out
        name, base = active[0], layer.base_layer
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        fused: Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[name])  # type: ignore[no-untyped-call]
        return fused

    return forward
