from __future__ import annotations

import json
from pathlib import Path

import pytest

from tercet.errors import UsageError
from tercet.recipes.session import SetupConfig
from tercet.recipes.trained import TrainedConfig, check_same_base, judge_place, settings_at, weights_at


def run(folder: Path, **settings: object) -> str:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(settings))
    return str(folder)


def test_the_model_and_the_renderer_are_those_the_weights_were_trained_with(tmp_path):
    place = run(tmp_path / "sft", model="tiny", renderer="role_colon")
    setup = TrainedConfig(threads=1).setup("base", None, place)
    assert (setup.model, setup.renderer, setup.threads) == ("tiny", "role_colon", 1)


def test_what_is_asked_for_wins_over_what_weights_were_trained_with(tmp_path):
    assert TrainedConfig(model="x").setup(run(tmp_path / "a", model="tiny")).model == "x"


def test_without_weights_the_defaults_hold():
    assert TrainedConfig().setup("base").model == SetupConfig().model


def test_weights_of_different_models_are_not_used_together(tmp_path):
    places = run(tmp_path / "a", model="tiny"), run(tmp_path / "b", model="smollm2-135m")
    with pytest.raises(UsageError, match=r"a was trained with model tiny, .*b with smollm2-135m"):
        TrainedConfig().setup(*places)


def test_a_model_whose_folder_was_moved_is_the_same(tmp_path):
    places = run(tmp_path / "a", model="/old/place/qwen"), run(tmp_path / "b", model="models/qwen")
    assert TrainedConfig().setup(*places).model == "/old/place/qwen"
    check_same_base(SetupConfig(model="qwen"), *places)


def test_weights_of_another_model_than_the_one_that_is_set_are_refused(tmp_path):
    with pytest.raises(UsageError, match="the model is smollm2-135m; give --model tiny"):
        check_same_base(SetupConfig(), "base", run(tmp_path / "a", model="tiny"))


def test_a_checkpoint_knows_the_settings_of_its_run_and_an_adapter_its_base(tmp_path):
    place = run(tmp_path / "a", model="tiny", max_length=99)
    checkpoint = Path(place) / "checkpoints/step-000002"
    checkpoint.mkdir(parents=True)
    assert settings_at(str(checkpoint)) == {"model": "tiny", "max_length": 99}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    assert settings_at(str(adapter)) == {"model": "Qwen/Qwen3-0.6B"}
    assert settings_at(str(tmp_path)) == {}


def test_a_place_without_weights_is_refused(tmp_path):
    assert weights_at("base", "policy") is None
    assert weights_at(None, "policy") is None
    with pytest.raises(UsageError, match="policy is 'nowhere', which is no directory"):
        weights_at("nowhere", "policy")
    with pytest.raises(UsageError, match="holds no trained weights"):
        weights_at(str(tmp_path), "policy")


def test_the_judge_of_a_whole_run_is_its_preference_model(tmp_path):
    run(tmp_path / "preference")
    assert judge_place(str(tmp_path)) == str(tmp_path / "preference")
    assert judge_place(str(tmp_path / "preference")) == str(tmp_path / "preference")
