"""The forward pass of frozen Llama-like models on the CPU, with their weights laid out for it.

The same numbers as transformers' modules, to rounding, in less time: queries, keys and values come out of one product;
activations and residuals are added while a product is written; rotation is one complex product in place; and every
weight lies in the blocks in which oneDNN multiplies, so that nothing is rearranged while decoding. That copy costs the
memory of the weights once more. It is made anew, layer by layer, when the model's parameters have changed. Adapters are
merged while it is made: merged weights are kept in no other place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional

from tercet.models.adapters import Update, merged
from tercet.models.cpu import has_onednn, multiplies_bfloat16
from tercet.models.tree_attention import Layout

LAYERS = frozenset({
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer",
})  # fmt: skip
"""Classes of transformers that were compared."""
# Blocks are chosen for products with this many rows; other numbers work with them as well.
ROWS = 128
# oneDNN writes code for every number of rows it meets, 0.6 MB and a millisecond for each kind of product, and keeps it:
# packed rows are filled up to whole steps, so that there are few such numbers.
PACKED_STEP = 64

# `model.to(dtype)` puts other numbers under the same parameter without counting up its version.
Source = tuple["ReferenceType[Tensor]", int, torch.dtype]
Updates = Mapping[nn.Module, Update]
"""What is added to the weights of some linear layers."""
NONE: Updates = MappingProxyType({})


def frozen_llama(trunk: nn.Module, head: nn.Module, updates: Updates = NONE) -> FrozenLlama | None:
    """The fast form of a model with its weights as they are now, kept from call to call; None when it has none."""
    if not is_known(trunk, head):
        forget(trunk)
        return None
    if trunk not in _KEPT:
        _KEPT[trunk] = FrozenLlama(trunk)
    _KEPT[trunk].refresh(trunk, head, updates)
    return _KEPT[trunk]


def forget(trunk: nn.Module) -> None:
    """Give the memory of a model's fast form back; it is made anew when it is wanted."""
    _KEPT.pop(trunk, None)


# Not an attribute of the model: whoever copies the model would copy it too.
_KEPT: WeakKeyDictionary[nn.Module, FrozenLlama] = WeakKeyDictionary()


def is_llama_layer(layer: nn.Module) -> bool:
    """Whether a layer is of a class that was compared."""
    kind = type(layer)
    # Code that came with a model may call its own layers so.
    return kind.__name__ in LAYERS and kind.__module__.startswith("transformers.models.")


def gates_with_silu(mlp: Any) -> bool:
    """Whether a layer's perceptron is gated by the activation that is computed here."""
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def is_known(trunk: Any, head: Any) -> bool:
    """Whether a model is of the kind computed here, down to the class of every part, and lies on a CPU."""
    layers = getattr(trunk, "layers", ())
    if not layers or not all(map(is_llama_layer, layers)):
        return False
    if not has_onednn():
        return False
    parts = [head, *(part for layer in layers for part in _linears(layer))]
    if any(type(part) is not nn.Linear for part in parts):
        return False
    if not all(gates_with_silu(layer.mlp) for layer in layers):
        return False
    if 2 * len(trunk.rotary_emb.inv_freq) != layers[0].self_attn.head_dim:
        return False
    kinds = {(p.dtype, p.device.type) for p in [*trunk.parameters(), *head.parameters()]}
    return kinds == {(torch.float32, "cpu")} or (kinds == {(torch.bfloat16, "cpu")} and multiplies_bfloat16())


def takes(trunk: Any, head: Any, updates: Updates) -> bool:
    """Whether a model is of that kind and its fast form can take these updates."""
    return is_known(trunk, head) and set(updates) <= {part for layer in trunk.layers for part in _linears(layer)}


class FrozenLlama:
    """A model's weights in oneDNN's blocks; see `frozen_llama`."""

    def __init__(self, trunk: Any) -> None:
        self.rotary = trunk.rotary_emb
        self.embedding: Tensor = trunk.embed_tokens.weight
        self.norm, self.head = _Norm(), _Linear()
        self.layers = [_Layer(layer) for layer in trunk.layers]

    def refresh(self, trunk: Any, head: Any, updates: Updates = NONE) -> None:
        """Take over the parameters and updates that are not the ones already laid out."""
        self.embedding = trunk.embed_tokens.weight
        self.norm.refresh(trunk.norm)
        self.head.refresh([head], dtype=torch.float32)
        for layer, source in zip(self.layers, trunk.layers, strict=True):
            layer.refresh(source, updates)

    def hidden(self, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Last hidden states (T, D) of one packed row (T,)."""
        h = functional.embedding(tokens, self.embedding)
        cos, sin = self.rotary(h.new_empty(0, dtype=torch.float32), positions[None])
        half = cos.shape[-1] // 2
        turn = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())[:, None]
        for i, layer in enumerate(self.layers):
            h = layer(i, h, turn, layout)
        return self.norm(h)

    def packed(self, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """The same of a row in which a layout has its tokens at places of its own, so that more may follow."""
        more = -len(tokens) % PACKED_STEP
        filled = functional.pad(tokens, (0, more)), functional.pad(positions, (0, more))
        return self.hidden(*filled, layout)[: len(tokens)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D), in float32."""
        return self.head(hidden.float())


class _Linear:
    """One or several linear layers of the same input as one product."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.weight, self.bias = torch.empty(0), cast(Tensor | None, None)

    def refresh(
        self,
        parts: Sequence[Any],
        updates: Updates = NONE,
        order: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Lay the weights out, rows in the given order, unless they are those already laid out."""
        tensors = [p for part in parts for p in (part.weight, part.bias, *updates.get(part, ())[:2]) if p is not None]
        if _same(self.sources, tensors):
            return
        weights = [
            merged(part, part.weight.detach(), *updates[part]) if part in updates else part.weight.detach()
            for part in parts
        ]
        weight = torch.cat(weights) if len(parts) > 1 else weights[0]
        bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
        if order is not None:
            weight, bias = weight[order], bias if bias is None else bias[order]
        weight, bias = weight.to(dtype or weight.dtype), bias if bias is None else bias.to(dtype or bias.dtype)
        self.weight = torch.empty(0)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.bias, self.sources = bias, _sources(tensors)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        scalars = [1.0] if activation == "swish" else []
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, scalars, "")
        return out

    def with_other(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        """The product, then `add` or `mul` with another tensor of its shape."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)
        return out


class _Norm:
    """Division by the root of the mean square, times a weight."""

    def __init__(self) -> None:
        self.weight, self.eps = torch.empty(0), 0.0

    def refresh(self, norm: Any) -> None:
        """Norms are read where they lie."""
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _Layer:
    """One layer: attention and the gated perceptron, each added to its input."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        d = attention.head_dim
        self.scale, self.rotates = attention.scaling, getattr(attention, "use_rope", True)
        self.heads = attention.q_proj.out_features // d
        self.kv_heads, self.d = attention.k_proj.out_features // d, d
        # Transformers turns the pair (i, i + d/2); side by side the two are a complex number. A score is a sum over the
        # pairs, so their order does not matter as long as queries and keys agree.
        self.pairs = torch.stack([torch.arange(d // 2), torch.arange(d // 2) + d // 2], 1).flatten()
        turned = (d * torch.arange(self.heads + self.kv_heads)[:, None] + self.pairs).flatten()
        straight = torch.arange(self.kv_heads * d) + len(turned)
        self.order = torch.cat([turned, straight])
        self.qkv, self.out, self.gate, self.up, self.down = (_Linear() for _ in range(5))
        self.before_attention, self.before_mlp = _Norm(), _Norm()
        self.head_norm: Tensor | None = None
        self.head_eps = 0.0

    def refresh(self, layer: Any, updates: Updates) -> None:
        """See `FrozenLlama.refresh`."""
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv.refresh([attention.q_proj, attention.k_proj, attention.v_proj], updates, self.order)
        self.out.refresh([attention.o_proj], updates)
        self.gate.refresh([mlp.gate_proj], updates)
        self.up.refresh([mlp.up_proj], updates)
        self.down.refresh([mlp.down_proj], updates)
        self.before_attention.refresh(layer.input_layernorm)
        self.before_mlp.refresh(layer.post_attention_layernorm)
        if hasattr(attention, "q_norm"):
            q, k = (norm.weight.detach()[self.pairs] for norm in (attention.q_norm, attention.k_norm))
            self.head_norm = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
            self.head_eps = attention.q_norm.variance_epsilon

    def __call__(self, index: int, h: Tensor, turn: Tensor, layout: Layout) -> Tensor:
        # Rotation and attention are cheap, and in float32 in any case.
        mixed = self.qkv(self.before_attention(h)).view(len(h), -1, self.d).float()
        both, value = mixed[:, : self.heads + self.kv_heads], mixed[:, self.heads + self.kv_heads :]
        if self.head_norm is not None:
            both = functional.rms_norm(both, (self.d,), None, self.head_eps).mul_(self.head_norm)
        if self.rotates:
            torch.view_as_complex(both.view(*both.shape[:2], -1, 2)).mul_(turn)
        query, key = both[:, : self.heads], both[:, self.heads :]
        seen = layout.attend(
            index, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self.scale
        ).transpose(0, 1)
        h = self.out.with_other(seen.reshape(len(h), -1).to(h.dtype), h, "add")
        x = self.before_mlp(h)
        return self.down.with_other(self.up.with_other(x, self.gate(x, "swish"), "mul"), h, "add")


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip


def _sources(tensors: Sequence[Tensor]) -> list[Source]:
    return [(ref(tensor), tensor._version, tensor.dtype) for tensor in tensors]


def _same(sources: Sequence[Source], tensors: Sequence[Tensor]) -> bool:
    """Whether these are the very tensors, and nobody has written into them since."""
    return len(sources) == len(tensors) and all(
        known() is tensor and version == tensor._version and dtype == tensor.dtype
        for (known, version, dtype), tensor in zip(sources, tensors, strict=True)
    )
