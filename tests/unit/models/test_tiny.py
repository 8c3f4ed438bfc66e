import hashlib
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.models import tiny
from tercet.models.tiny import tiny_model


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_does_not(tmp_path):
    state = torch.random.get_rng_state()
    first, second = contents(tiny_model(tmp_path / "a")), contents(tiny_model(tmp_path / "b"))
    other = contents(tiny_model(tmp_path / "c", seed=1))
    assert first == second
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["tokenizer.json"] == first["tokenizer.json"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_is_made_once_and_then_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path))
    started = time.perf_counter()
    directory = tiny.fetch()
    assert time.perf_counter() - started < 2
    made = (directory / "model.safetensors").stat().st_mtime_ns
    assert tiny.fetch() == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    assert directory.is_relative_to(tmp_path)


def test_the_tokenizer_gives_back_any_text_and_tells_the_labels_apart(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path))
    text = "Preferred: A or B? 1984 is  not\n\n 12; é日本 🎈 <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) < len(text)
    a, b = (tokenizer(label, add_special_tokens=False)["input_ids"] for label in "AB")
    assert len(a) == len(b) == 1
    assert a != b
    assert tokenizer.pad_token is None


def test_the_chat_template_ends_every_message_and_opens_the_answer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert AutoTokenizer.from_pretrained(tiny_model(tmp_path / "base", chat_template=False)).chat_template is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_variant_loads_with_plain_transformers(tmp_path, architecture, tied):
    directory = tiny_model(tmp_path, architecture, tied=tied, context=64, layers=1)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == architecture
    assert model.config.max_position_embeddings == 64
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied
    assert model(input_ids=torch.arange(64)[None]).logits.shape == (1, 64, model.config.vocab_size)
