"""Norm and gate as one operation: transformers' numbers and gradients, with less kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tercet.models.lean_layers import slim


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of model."""
    return request.param


def layer(kind: str, **settings: str) -> Any:
    """One of transformers."""
    config = AutoConfig.for_model(
        kind, vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=None, **settings,
    )  # fmt: skip
    return AutoModel.from_config(config).layers[0]


def layers(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A layer of transformers, and its copy made lean."""
    torch.manual_seed(0)
    plain = layer(kind).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for norm in (plain.input_layernorm, plain.post_attention_layernorm):
            norm.weight.add_(torch.randn(16))
    lean = copy.deepcopy(plain)
    slim(lean)
    assert all("forward" in vars(each) for each in (lean.input_layernorm, lean.post_attention_layernorm, lean.mlp))
    return plain, lean


def through(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What norm and perceptron make of a tensor, and the gradient of a weighted sum of it."""
    x = x.clone().requires_grad_()
    out = layer.mlp(layer.post_attention_layernorm(x))
    weights = torch.linspace(-1, 2, out.numel()).reshape(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), x.grad


def test_numbers_and_gradients_are_those_of_transformers(kind):
    plain, lean = layers(kind, torch.float32)
    x = torch.randn(5, 7, 16)
    for ours, theirs in zip(through(lean, x), through(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_published_formula(kind):
    norm, gate = (getattr(layers(kind, torch.float64)[1], part) for part in ("input_layernorm", "mlp"))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(gate, x)
    direct = x / torch.sqrt((x**2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
    torch.testing.assert_close(norm(x), direct, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_they_are_as_near_to_the_truth_as_transformers_are(kind):
    x = torch.randn(64, 16).bfloat16()
    plain, lean = layers(kind, torch.bfloat16)
    true = [each.float() for each in through(layers(kind, torch.float32)[0], x.float())]
    for ours, theirs, exact in zip(through(lean, x), through(plain, x), true, strict=True):
        assert (ours.float() - exact).abs().mean() <= 1.1 * (theirs.float() - exact).abs().mean()


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 24 * 4), (torch.bfloat16, 24 * 2 + 16 * 2)])
def test_less_is_kept_for_the_gradient(kind, dtype, least):
    sizes = []
    for layer in layers(kind, dtype):
        kept: dict[int, int] = {}
        weights = {weight.data_ptr() for weight in layer.parameters()}

        def keep(tensor: torch.Tensor, kept=kept, weights=weights) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            through(layer, torch.randn(100, 16).to(dtype))
        sizes.append(sum(kept.values()))
    plain, lean = sizes
    assert plain - lean >= 100 * least


def test_a_norm_that_learns_and_another_activation_stay_as_they_are(kind):
    _, lean = layers(kind, torch.float32)
    lean.post_attention_layernorm.weight.requires_grad_(True)
    lean.post_attention_layernorm(torch.randn(2, 16)).sum().backward()
    assert lean.post_attention_layernorm.weight.grad is not None
    other = layer(kind, hidden_act="gelu")
    slim(other)
    assert "forward" not in other.mlp.__dict__
