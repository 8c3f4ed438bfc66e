"""Which models can compute a packed forest of sequences, and why another cannot.

A forest is right only where nothing but attention mixes tokens, attention goes through transformers'
`AttentionInterface` with no term of its own, every layer sees the whole context, and the head's output is the logits.
Nothing in a config says all of that, so the architectures are listed by name, each one compared with its plain forward
by a test; what can differ inside one is read from the config.
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


def takes_tree(config: PretrainedConfig) -> bool:
    """Whether the model gives every sequence of a packed forest what it would give it alone."""
    return why_no_tree(config) is None


def why_no_tree(config: PretrainedConfig) -> str | None:
    """What keeps a model from taking a forest, in words that follow its name; None when nothing does."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"has layers that are not plain attention ({', '.join(sorted(kinds))})"
    if text is not config:
        return f"is made of several models ({config.model_type}); only pure language models can be used"
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
    rope = getattr(text, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            return f"rotates by the longest sequence at hand (rope type {one['rope_type']}), so neighbours would matter"
    return None


def require_tree(config: PretrainedConfig, name: str) -> None:
    """Pass for a model that takes a forest.

    Raises:
        ModelError: It does not; the message says why.
    """
    reason = why_no_tree(config)
    if reason is not None:
        raise ModelError(
            f"{name} {reason}, so it cannot be used here; a model with full attention in every layer can: Llama, "
            "Qwen2, Qwen3, SmolLM, OLMo, GPT-2 and others (docs/models.md has the list)"
        )


def context_tokens(config: PretrainedConfig) -> int:
    """The longest sequence the model takes.

    Raises:
        ModelError: The config does not say.
    """
    text = config.get_text_config()
    # transformers maps the names architectures have for it (n_positions, ...) to this one.
    length = getattr(text, "max_position_embeddings", None)
    if not length:
        raise ModelError(f"the config of this {config.model_type} does not say how long a sequence may be")
    return int(length)


def _window(text: Any) -> int | None:
    """The window that some layer looks through; None when all see everything."""
    kinds = getattr(text, "layer_types", None)
    slides = getattr(text, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    window = getattr(text, "sliding_window", None)
    return int(window) if slides and window else None
