import shutil

import pytest

from tercet.errors import ModelError
from tercet.models.names import BUILTIN, hub_id, resolve
from tercet.models.tiny import tiny_model


def test_a_local_directory_is_itself(tmp_path):
    assert resolve(str(tiny_model(tmp_path / "mine"))) == tmp_path / "mine"


def test_a_built_in_name_means_the_same_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert (resolve("tiny") / "config.json").is_file()
    with pytest.raises(ModelError, match="no config.json"):
        resolve("./tiny")


def test_a_directory_that_is_no_model_is_refused_with_what_lies_there(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config.json.*found there: notes.txt"):
        resolve(str(tmp_path))


def test_an_adapter_given_as_a_model_is_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelError, match="is an adapter on some/base"):
        resolve(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        resolve(str(tmp_path))


def test_a_model_with_a_shard_missing_is_named_as_not_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    weights = '{"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}'
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {weights}}}')
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is missing"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match=r"no directory.*smollm2-135m"):
        resolve(name)


def test_a_misspelt_built_in_name_gets_the_nearest():
    with pytest.raises(ModelError, match="did you mean smollm2-135m"):
        resolve("smolm2-135m")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache in a place of its own. huggingface_hub reads its variables at import, hence its constants."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def lay_out(cache, org, name):
    snapshot = cache / f"models--{org}--{name}" / "snapshots" / "0123abc"
    tiny_model(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    return snapshot


def test_a_hub_id_is_found_in_the_hubs_cache_without_a_network(hub_cache):
    snapshot = lay_out(hub_cache, "someone", "small-model")
    assert resolve("someone/small-model") == snapshot
    assert hub_id(str(snapshot)) == "someone/small-model"


def test_an_unreachable_hub_is_an_error_that_says_what_to_do(hub_cache):
    with pytest.raises(ModelError, match=r"cannot be reached.*HF_HUB_OFFLINE.*HF_ENDPOINT.*smollm2-135m"):
        resolve("someone/absent-model")


def test_the_built_in_model_is_taken_from_the_hubs_cache_when_it_is_there(hub_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    snapshot = lay_out(hub_cache, "HuggingFaceTB", "SmolLM2-135M-Instruct")
    directory = resolve("smollm2-135m")
    assert (directory / "model.safetensors").read_bytes() == (snapshot / "model.safetensors").read_bytes()
    assert "hub: HuggingFaceTB/SmolLM2-135M-Instruct at 0123abc" in (directory / "tercet_source.json").read_text()
    assert hub_id(str(directory)) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    shutil.rmtree(hub_cache)
    assert resolve("smollm2-135m") == directory


def test_every_built_in_name_says_what_it_is_and_where_others_find_it():
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("tiny") is None
    assert hub_id("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert all(built.about for built in BUILTIN.values())
