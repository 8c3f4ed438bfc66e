"""What a run will need of memory, by arithmetic on a model's config. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tercet.errors import ModelError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Logits are computed for this many tokens at a time: 256 rows of a 50,000-token vocabulary are 50 MB in float32, enough
# for full matmul speed, small beside any model. See tercet.models.logprobs.
CHUNK_TOKENS, HEAD_COPIES = 256, 3
# On a CPU attention is computed in spans of up to this many tokens (fewer calls than one a branch, little masked-out
# work), going back with weights and two gradients of theirs at hand: see tercet.engine.outputs.
SPAN_TOKENS, SCORE_COPIES = 128, 3
PASS_TOKENS, MOST_PASS_TOKENS, PASS_SHARE = 1024, 16384, 4
"""Tokens of one pass with gradient where nobody says how many: on a CPU, which more do not make faster; on a GPU at
most, as many as take one part in so many of its memory."""
LAID_OUT = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""`model_type` of what `tercet.models.frozen_llama` keeps once more, laid out for the CPU."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder, from its config."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    gated: bool
    vocabulary: int
    tied: bool
    positions: int
    """Learned positions; 0 when they are rotated."""
    experts: int
    laid_out: bool = False
    """Whether frozen weights are kept once more on a CPU, in the blocks in which they are multiplied."""

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        # Without rotation (GPT-2) queries, keys and values are one layer.
        attention = [(self.hidden, q + 2 * kv)] if self.positions else [(self.hidden, q), *2 * [(self.hidden, kv)]]
        up = (2 if self.gated else 1) * [(self.hidden, self.intermediate)]
        return [*attention, (q, self.hidden), *self.experts * [*up, (self.intermediate, self.hidden)]]

    @property
    def parameters(self) -> int:
        """Weights of the whole model, biases and norms nearly."""
        vocabulary = self.vocabulary * self.hidden
        block = sum(i * o for i, o in self.linears) + 2 * self.hidden
        return (1 if self.tied else 2) * vocabulary + self.positions * self.hidden + self.layers * block + self.hidden


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, by what they are for."""

    base: int
    """The frozen base model."""
    merged: int
    """The sampler's copy of the layers that have an adapter, merged; 0 where they are merged as they are laid out.
    Without an adapter the whole model once more, in float32."""
    references: int
    """Whole models beside the base that neither learn nor are drawn from, in float32."""
    laid_out: int
    """The sampler's linear layers and, in float32, its head once more, in the blocks in which a CPU multiplies them."""
    trained: int
    """What is trained, with its gradient and the two moments of Adam, in float32."""
    handed_over: int
    """The whole model that was sampled from before, still there while the next copy is made."""
    activations: int
    """What the forward pass of one micro-batch keeps for the backward pass."""
    backward: int
    """What the backward pass of one layer takes beside: its gradients, and attention's scores."""
    head: int
    """Logits of one piece."""
    kv_cache: int
    """Keys and values of the rows being sampled."""
    vllm: int
    """vLLM's own weights, keys and values, when it samples."""

    @property
    def total(self) -> int:
        """The sum; training, the next sampler and sampling take turns, so of what only one of them needs the largest
        counts."""
        kept = self.base + self.merged + self.references + self.trained + self.vllm
        turns = self.activations + self.backward, self.laid_out + self.kv_cache, self.handed_over
        return kept + self.head + max(turns)

    def describe(self) -> str:
        """One line, in GB, without what is nothing."""
        parts = [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)]
        listed = ", ".join(f"{name} {amount / 1e9:.2f}" for name, amount in parts if amount)
        return f"{self.total / 1e9:.2f} GB ({listed})"


def read_shape(directory: Path) -> Shape:
    """The sizes in a model directory's config.json.

    Raises:
        ModelError: There is no config, or it lacks a size.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ModelError(f"{directory} has no config.json; a model directory was wanted")
    return shape(json.loads(file.read_text()))


def shape(config: Mapping[str, Any]) -> Shape:
    """The sizes in a config as it stands in config.json.

    Raises:
        ModelError: A size is missing.
    """
    config = config.get("text_config") or config

    def get(*names: str, default: int | None = None) -> int:
        for name in names:
            if config.get(name) is not None:
                return int(config[name])
        if default is None:
            raise ModelError(f"the config has no {' or '.join(names)}; memory cannot be estimated without it")
        return default

    hidden, heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
    learned = config.get("model_type") in ("gpt2", "gpt_bigcode", "opt")
    return Shape(
        layers=get("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=get("num_key_value_heads", default=heads),
        head_size=get("head_dim", default=hidden // heads),
        intermediate=get("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        gated=not learned and config.get("model_type") not in ("gpt_neox", "phi", "starcoder2", "persimmon"),
        vocabulary=get("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", learned)),
        positions=get("n_positions", "max_position_embeddings") if learned else 0,
        experts=get("num_local_experts", "num_experts", default=1),
        laid_out=config.get("model_type") in LAID_OUT,
    )


def estimate(
    model: Shape,
    *,
    lora_rank: int | None = 16,
    adapters: int = 1,
    dtype: str = "float32",
    micro_batch_tokens: int = 4096,
    sampled_rows: int = 0,
    row_tokens: int = 0,
    longest_tokens: int = 0,
    tied: int = 1,
    references: int = 0,
    vllm_bytes: int = 0,
    on_cpu: bool = True,
) -> Memory:
    """Bytes that training and sampling take, allocator and Python aside: no bound.

    Args:
        model: Its sizes.
        lora_rank: Of an adapter on every linear layer; None trains the whole model, on a copy in float32.
        adapters: Trained side by side on the one base.
        dtype: Of the base.
        micro_batch_tokens: Tokens in one forward and backward pass, after merging.
        sampled_rows: Rows decoded at once; 0 samples nothing.
        row_tokens: Prompt and answer of such a row.
        longest_tokens: Of a sequence that is learned; 0 where all of a micro-batch may be one.
        tied: Such sequences that are computed together, whatever the micro-batch: the two of a pair.
        references: Models that were read from a save and neither learn nor are drawn from: a reference, a judge. An
            adapter's are merged into the copy that is sampled from, in turn.
        vllm_bytes: What vLLM takes, where it samples; rows are then in its cache.
        on_cpu: Whether it is computed there. Frozen Llama-like models are then laid out once more, by the first stage
            that samples or scores; it is counted for every one.
    """
    rank = lora_rank or 0
    # Of a number of what learns and is sampled from. A whole model that learns is float32 whatever the base is.
    size = BYTES[dtype] if rank else 4
    linear = model.layers * sum(i * o for i, o in model.linears)
    trained = adapters * (model.layers * rank * sum(i + o for i, o in model.linears) if rank else model.parameters)
    kv_tokens = 0 if vllm_bytes else sampled_rows * row_tokens
    tokens = max(micro_batch_tokens, tied * longest_tokens)
    # On a CPU attention is in float32, whatever the weights are in.
    attended = 4 if on_cpu else size
    one_layer = tokens * _kept_per_token(model, rank, size, attended)
    scores = SCORE_COPIES * model.heads * min(SPAN_TOKENS, tokens) * min(longest_tokens or tokens, tokens) * 4
    laid_out = model.laid_out and on_cpu
    # vLLM takes over whole weights.
    late = laid_out and bool(rank) and not vllm_bytes
    whole = 0 if rank else model.parameters * size
    return Memory(
        base=model.parameters * BYTES[dtype],
        merged=0 if not sampled_rows or late else whole or linear * size,
        references=references * whole,
        laid_out=linear * size + model.vocabulary * model.hidden * 4 if laid_out else 0,
        trained=trained * 4 * 4,
        handed_over=whole if sampled_rows else 0,
        activations=model.layers * one_layer,
        backward=one_layer + (scores if on_cpu else 0),
        # A bfloat16 head multiplies in float32 on a CPU, from a copy made for each piece. The gradient of one that
        # learns is made for each piece and added to those before it.
        head=HEAD_COPIES * CHUNK_TOKENS * model.vocabulary * 4
        + model.vocabulary * model.hidden * 4 * (int(on_cpu and dtype == "bfloat16") if rank else 2),
        kv_cache=kv_tokens * model.layers * 2 * model.kv_heads * model.head_size * attended,
        vllm=vllm_bytes,
    )


def pass_tokens(model: Shape, gpu_bytes: int | None, *, lora_rank: int | None, dtype: str) -> int:
    """How many tokens pass at once with gradient where nobody says.

    Args:
        model: Its sizes.
        gpu_bytes: Memory of the GPU that computes; None on a CPU.
        lora_rank: Of adapters; None trains the whole model.
        dtype: Of the base.
    """
    tokens = PASS_TOKENS if gpu_bytes is None else MOST_PASS_TOKENS
    while tokens > PASS_TOKENS:
        found = estimate(model, lora_rank=lora_rank, dtype=dtype, micro_batch_tokens=tokens, on_cpu=False)
        if PASS_SHARE * (found.activations + found.backward) <= (gpu_bytes or 0):
            break
        tokens //= 2
    return tokens


def _kept_per_token(model: Shape, rank: int, size: int, attended: int) -> int:
    """Bytes one layer keeps of one token: the inputs of its norms, products and linear layers.

    Args:
        model: Its sizes.
        rank: Of adapters.
        size: Of a number of the model.
        attended: Of a number in attention.
    """
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    # See tercet.models.lean_layers.
    lean = model.laid_out and bool(rank)
    # Their inputs and outputs; else inputs as they are computed with, in float32; what their weights learn from.
    norms = 2 * model.hidden * ((size if lean else 4) + size + (0 if rank else size))
    # Queries, keys, values; and the result.
    attention = (q + 2 * kv) * attended + q * size
    # Gate, its activation, up and their product. Of many experts a token passes a few; two is usual.
    mlp = min(model.experts, 2) * ((3 if lean else 4) if model.gated else 2) * model.intermediate
    return norms + attention + (mlp + rank * min(len(model.linears), 7)) * size
