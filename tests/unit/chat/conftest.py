"""Small real tokenizers, trained on the spot, with the chat templates found in the wild."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As in TRL's training templates; the mark leaves the stop outside, on purpose.
GENERATION = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- message['content'].split('</think>')[-1] if not loop.last else message['content'] }}
        {%- endgeneration %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
# Takes the thoughts out of every answer but the last: what it wrote is not how it goes on.
FORGETFUL = GENERATION.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
# Puts an empty block of thought before every answer, as templates of thinking models do for answers without thoughts.
THOUGHTLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Refuses system messages and wants user and assistant in turns, as Gemma's does.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Drops system messages after the first without a word.
DEAF = CHATML.replace(
    "{{ '<|im_start|>' + message['role']",
    "{% if message['role'] == 'system' and not loop.first %}{% continue %}{% endif %}"
    "{{ '<|im_start|>' + message['role']",
)
# Ends turns with words, not with a token.
WORDS = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '\n### end\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)

TEXT = [
    "User: Hi Assistant: Hello. System: ==== Completion A ==== ==== Completion B ==== ==== Preference ==== Tie",
    "You are helpful. Tell me a joke, please. Knock knock.\n\nWho is there? assistant\nsystem\nuser\n### end\n",
    "The quick brown fox jumps over the lazy dog; it sleeps well.\n\nUser: Assistant: A B Tie",
] * 3


def _byte_level(template: str | None, special: list[str], **roles: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _chatml(template: str | None) -> Any:
    # As SmolLM2's: BOS opens every turn, EOS ends it and pads as well.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level(template, special, bos_token=special[1], eos_token=special[2], pad_token=special[2])


def _llama3() -> Any:
    from tokenizers.processors import TemplateProcessing

    special = ["<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(LLAMA3, special, bos_token=special[0], eos_token=special[1])
    # Puts BOS before whatever it encodes unless told not to.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def _strict() -> Any:
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return _byte_level(STRICT, special, bos_token="<bos>", eos_token="<eos>")


def _metaspace() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=[*string.printable, "é", "😀"],
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% else %}{{ message['role'] + ':' + message['content'] + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    return tokenizer


MAKERS: dict[str, Callable[[], Any]] = {
    "chatml": lambda: _chatml(CHATML),
    "llama3": _llama3,
    "generation": lambda: _chatml(GENERATION),
    "forgetful": lambda: _chatml(FORGETFUL),
    "thoughtless": lambda: _chatml(THOUGHTLESS),
    "strict": _strict,
    "deaf": lambda: _chatml(DEAF),
    "words": lambda: _chatml(WORDS),
    "metaspace": _metaspace,
    "no_template": lambda: _chatml(None),
    "no_bos": lambda: _byte_level(None, ["<|endoftext|>"], eos_token="<|endoftext|>"),
    "no_special": lambda: _byte_level(None, []),
}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """Every tokenizer by name."""
    return {name: make() for name, make in MAKERS.items()}
