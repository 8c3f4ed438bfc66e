import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from tercet.errors import ModelError
from tercet.models import tree_attention
from tercet.models.cpu import multiplies_bfloat16
from tercet.models.load import fitting_dtype, load_model, load_tokenizer
from tercet.models.tiny import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_loaded_model_is_frozen_has_no_dropout_and_tercets_attention(tmp_path, architecture):
    loaded = load_model(str(tiny_model(tmp_path, architecture)))
    model = loaded.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == tree_attention.NAME
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.train()
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    rates = {key: value for key, value in vars(model.config).items() if "dropout" in key or "pdrop" in key}
    assert rates
    assert not any(value for value in rates.values() if isinstance(value, float))


def test_attention_dropout_in_a_config_is_switched_off(tmp_path):
    directory = tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = load_model(str(directory)).model
    assert model.config.attention_dropout == 0
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)


def test_weights_in_bfloat16_are_loaded_as_the_dtype_asked_for(tmp_path):
    directory = tiny_model(tmp_path)
    half = {name: value.bfloat16() for name, value in load_file(directory / "model.safetensors").items()}
    save_file(half, directory / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        assert {p.dtype for p in load_model(str(directory), dtype=dtype).model.parameters()} == {getattr(torch, dtype)}
    with pytest.raises(ModelError, match="dtype is 'int4'; it must be auto or one of float32"):
        load_model(str(directory), dtype="int4")


def test_the_fitting_dtype_is_bfloat16_where_it_is_fast_and_the_model_large_enough_to_gain(tmp_path):
    large = {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    for name, layers in (("large", 30), ("small", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**large, "num_hidden_layers": layers}))
    fast = "bfloat16" if multiplies_bfloat16() else "float32"
    assert fitting_dtype(tmp_path / "large", torch.device("cpu")) == fast
    assert fitting_dtype(tmp_path / "small", torch.device("cpu")) == "float32"
    assert fitting_dtype(tmp_path / "small", torch.device("cuda")) == "bfloat16"
    assert load_model(str(tiny_model(tmp_path / "tiny")), dtype="auto").model.dtype == torch.float32


def test_tied_embeddings_stay_one_tensor(tmp_path):
    model = load_model(str(tiny_model(tmp_path))).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_no_padding_and_no_beginning_token_are_needed(tmp_path):
    loaded = load_model(str(tiny_model(tmp_path, "gpt2")))
    assert loaded.tokenizer.pad_token is None
    assert loaded.tokenizer.bos_token is None
    assert loaded.context_tokens == 1024
    assert loaded.eos_token_ids == (loaded.tokenizer.eos_token_id,)


def test_every_ending_token_of_the_generation_config_is_known(tmp_path):
    directory = tiny_model(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 2, 77]}')
    assert load_model(str(directory)).eos_token_ids == (0, 2, 77)


def test_a_model_with_weights_missing_is_refused_instead_of_made_up(tmp_path):
    directory = tiny_model(tmp_path)
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights .*layers.1.mlp.up_proj"):
        load_model(str(directory))


def test_damaged_weights_are_a_model_error(tmp_path):
    directory = tiny_model(tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(directory))


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_read(tmp_path):
    directory = tiny_model(tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    LlamaConfig(rope_parameters=rope).save_pretrained(directory)
    with pytest.raises(ModelError, match="rotates by the longest sequence"):
        load_model(str(directory))


def test_a_model_that_takes_no_forest_says_why_and_keeps_an_attention_of_transformers(tmp_path):
    directory = tiny_model(tmp_path)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "model_type": "mistral", "sliding_window": 8}))
    loaded = load_model(str(directory))
    assert loaded.why_no_tree == "has attention windows of 8 tokens in a context of 1024"
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.plain_head


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    directory = tiny_model(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(directory))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match="device is 'tpu'; it must be cpu"):
        load_model("tiny", device="tpu")
    with pytest.raises(ModelError, match="torch sees"):
        load_model("tiny", device="cuda:99")


def test_nothing_is_printed_while_loading(tmp_path, capfd):
    load_model(str(tiny_model(tmp_path)))
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_the_built_in_tiny_model_loads_by_name():
    loaded = load_model("tiny")
    assert loaded.name == "tiny"
    assert loaded.tokenizer.chat_template == load_tokenizer("tiny").chat_template
