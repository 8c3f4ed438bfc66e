"""Which models can compute a packed forest of sequences, why another cannot, and which cannot be used at all.

A forest is right only where nothing but attention mixes tokens, attention goes through transformers'
`AttentionInterface` with no term of its own, every layer sees the whole context, and the head's output is the logits.
Nothing in a config says all of that, so the architectures are listed by name, each one compared with its plain forward
by a test; what can differ inside one is read from the config. Other models compute right-padded rows
(`tercet.models.padded`).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tercet.errors import ModelError

ARCHITECTURES = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma3_text", "glm",
    "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense",
    "jais2", "llama", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "olmo",
    "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
"""`model_type` of the architectures that were compared."""
UNBOUNDED_TOKENS = 1 << 20
"""What is said of the context of a model that keeps a state instead of looking back: none is too long for it."""


def takes_tree(config: PretrainedConfig) -> bool:
    """Whether the model gives every sequence of a packed forest what it would give it alone."""
    return why_no_tree(config) is None


def why_no_tree(config: PretrainedConfig, *, own_code: bool = False) -> str | None:
    """What keeps a model from taking a forest, in words that follow its name; None when nothing does.

    Args:
        config: Of the model.
        own_code: Whether Python files that came with the model compute it.
    """
    text: Any = config.get_text_config()
    if own_code:
        return "is computed by code that came with it"
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"has layers that are not plain attention ({', '.join(sorted(kinds))})"
    if text is not config:
        return _several(config)
    if config.model_type not in ARCHITECTURES:
        return f"has the architecture {config.model_type}, whose attention is not known to take a packed forest"
    context = context_tokens(config)
    window = _window(text)
    if window is not None and window < context:
        return f"has attention windows of {window} tokens in a context of {context}"
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap is not None:
        return f"caps its attention scores (at {cap:g})"
    for key, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1)):
        value = getattr(text, key, neutral)
        if value != neutral:
            return f"changes its logits after the head ({key} is {value:g})"
    return _rotates_by_neighbours(text)


def require_rows(config: PretrainedConfig, name: str) -> None:
    """Pass for a model whose config does not rule out that it computes sequences side by side.

    Raises:
        ModelError: It does; the message says why.
    """
    text = config.get_text_config()
    reason = _several(config) if text is not config else _rotates_by_neighbours(text)
    if reason is not None:
        raise ModelError(
            f"{name} {reason}, so it cannot be used here; a language model whose rotation is fixed can: Llama, "
            "Qwen2, Qwen3, SmolLM, OLMo, GPT-2 and others (docs/models.md has the list)"
        )


def _several(config: PretrainedConfig) -> str:
    return f"is made of several models ({config.model_type}); only pure language models can be used"


def _rotates_by_neighbours(text: Any) -> str | None:
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            return f"rotates by the longest sequence at hand (rope type {one['rope_type']}), so neighbours would matter"
    return None


def context_tokens(config: PretrainedConfig) -> int:
    """The longest sequence the model takes; `UNBOUNDED_TOKENS` when no layer looks back.

    Raises:
        ModelError: The config does not say.
    """
    text = config.get_text_config()
    # transformers maps most of the names architectures have for it (n_positions, ...) to the first.
    names = ("max_position_embeddings", "seq_length", "max_seq_len", "max_sequence_length", "context_length")
    length = next((value for value in (getattr(text, name, None) for name in names) if value), None)
    if not length:
        kinds = set(getattr(text, "layer_types", None) or [])
        if kinds and not any(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds):
            return UNBOUNDED_TOKENS
        raise ModelError(f"the config of this {config.model_type} does not say how long a sequence may be")
    return int(length)


def _window(text: Any) -> int | None:
    """The window that some layer looks through; None when all see everything."""
    kinds = getattr(text, "layer_types", None)
    slides = getattr(text, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    window = getattr(text, "sliding_window", None)
    return int(window) if slides and window else None
