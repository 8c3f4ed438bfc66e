"""A Qwen2 of a given size with random weights: speed does not hang on what they are, and nothing has to be fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "smallest": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}  # fmt: skip
"""Those of Qwen2.5 0.5B and 1.5B; the vocabulary is the tokenizer's."""
CONTEXT = 8192


def random_model(directory: Path, size: str, tokenizer_of: Path, dtype: str) -> Path:
    """Write such a model into a directory.

    Args:
        directory: Where; made when it is not there.
        size: A key of `SIZES`.
        tokenizer_of: The model whose tokenizer it gets.
        dtype: In which it is written.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_of)
    config = Qwen2Config(
        **SIZES[size], vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
