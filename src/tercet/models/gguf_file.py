"""A Llama in a GGUF file, made a Hugging Face directory with float32 weights.

transformers can read such a file too (`gguf_file=`), and the weights are the same bit for bit; but it parses the file's
98,000 strings three times (20 to 60 s for SmolLM2-135M instead of 5 to 10), and it drops the file's pre-tokenizer:
digits are then not split off, and "\\n\\n1." becomes other tokens than those the model was trained on (17 nats worse on
a numbered list of two lines).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tercet.errors import ModelError

CONTROL_TOKEN, USER_TOKEN = 3, 4

OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYERS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert(file: Path, directory: Path, report: Callable[[float], None] = lambda share: None) -> None:
    """Write config, float32 safetensors, tokenizer with chat template, and generation config.

    Args:
        file: The GGUF file.
        directory: An existing directory to write into.
        report: Called with the share done, from 0 to 1.

    Raises:
        ModelError: The file is no GGUF, or holds another architecture or tokenizer than a Llama with SmolLM's.
    """
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError) as error:
        raise ModelError(f"{file.name} cannot be read as a GGUF file ({error}); fetch it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise ModelError(
            f"{file.name} holds architecture {fields.get('general.architecture')} with tokenizer "
            f"{fields.get('tokenizer.ggml.pre')}; only llama with smollm's is converted: give a Hugging Face directory"
        )
    report(0.3)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = _config(fields, tied)
    tensors: dict[str, torch.Tensor] = {}
    for i, tensor in enumerate(reader.tensors):
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        tensors[_name(tensor.name)] = torch.from_numpy(_rows_in_order(weight, tensor.name, config).copy())
        report(0.3 + 0.5 * i / len(reader.tensors))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    ends = {name: fields[f"tokenizer.ggml.{name}"] for name in ("bos_token_id", "eos_token_id")}
    generation: Any = GenerationConfig
    generation(**ends, pad_token_id=fields["tokenizer.ggml.padding_token_id"]).save_pretrained(directory)
    report(0.9)
    _tokenizer(fields).save_pretrained(directory)
    report(1.0)


def _config(fields: dict[str, Any], tied: bool) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        # A float32 in the file, which would otherwise be written as 9.999999747378752e-06.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _name(name: str) -> str:
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    block, layer, rest = name.split(".", 2)
    if block != "blk" or rest not in IN_LAYERS:
        raise ModelError(f"the GGUF file has a tensor {name}, which a Llama does not have")
    return f"model.layers.{layer}.{IN_LAYERS[rest]}"


def _rows_in_order(weight: NDArray[np.float32], name: str, config: LlamaConfig) -> NDArray[np.float32]:
    """GGUF interleaves the two halves that rotary embeddings rotate; Hugging Face keeps one after the other."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    heads = {"attn_q.weight": queries, "attn_k.weight": keys}
    for ending, number in heads.items():
        if name.endswith(ending):
            return weight.reshape(number, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return weight


def _tokenizer(fields: dict[str, Any]) -> Any:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's pre-tokenizer `smollm`: every digit alone, then GPT-2's rule.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == CONTROL_TOKEN
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == USER_TOKEN]
    )
    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
