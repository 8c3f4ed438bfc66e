"""A two-layer random model with a tokenizer made on the spot: as real as any to the code, and ready in a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tercet.models.directories import cache_directory, made_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Part of the directory's name: a changed recipe makes a new model instead of meeting the old one in the cache.
RECIPE = 1

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# What the tokenizer's merges are learned from: common words of questions, answers and comparisons.
TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about "
    "out many then them these so some her would make like him into time has look two more write go see number no "
    "way could people my than first water been call who its now find long down day did get come made may part "
    "over please give me a short answer to the question. Here is the answer: I think that you should tell the "
    "user what they want to know. Comparison of two responses. Completion A, Completion B. Preferred. system user "
    "assistant helpful Thank you! Why? Because it works well, and it is right; it isn't wrong. 1, 2, 3. "
    "\n\n"
)


def fetch() -> Path:
    """The built-in model `tiny`, made in the cache the first time."""
    directory = cache_directory() / "models" / f"tiny-{RECIPE}"
    with made_once(directory) as making:
        if making is not None:
            tiny_model(making)
    return directory


def tiny_model(
    directory: Path,
    architecture: Literal["llama", "gpt2"] = "llama",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 1024,
    tied: bool = True,
    chat_template: bool = True,
    seed: int = 0,
) -> Path:
    """Write a random model and its tokenizer into a directory; the same arguments give the same bytes.

    Args:
        directory: Where; made when it is not there.
        architecture: A Llama as SmolLM2 is one, or a GPT-2 (learned positions, dropout in its config, no BOS).
        layers: Number of layers.
        hidden: Width.
        heads: Attention heads.
        kv_heads: Key and value heads (Llama only).
        context: Longest sequence, in tokens.
        tied: Whether the head shares the embedding's weights.
        chat_template: Whether the tokenizer has one; without, it is a base model's.
        seed: Of the weights.
    """
    import torch
    import transformers
    from transformers import GPT2Config, LlamaConfig

    from tercet.models.quiet import quiet

    directory.mkdir(parents=True, exist_ok=True)
    untyped: Any = transformers
    tokenizer = untyped.PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(),
        bos_token="<|im_start|>" if architecture == "llama" else None,
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE if chat_template else None,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer), "tie_word_embeddings": tied, "pad_token_id": None,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = (
        LlamaConfig(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=context, **shared,
        )
        if architecture == "llama"
        else GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=context, **shared)
    )  # fmt: skip
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untyped.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


def _byte_pairs() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer
