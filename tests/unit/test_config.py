from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml

from tercet.config import differences, from_mapping, load, parse, suggestion, to_mapping, to_yaml
from tercet.errors import ConfigError
from tercet.types import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the recipe."""

    learning_rate: float = 2e-4
    """Peak of the schedule, in units of 100% honesty."""
    max_steps: int | None = None
    pack: bool = True
    schedule: Literal["linear", "cosine"] = "linear"
    stop: tuple[str | int, ...] = ()
    lora: LoraConfig | None = LoraConfig()

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "large": {"sft": {"learning_rate": 1e-3}, "sft.lora.rank": 64}
    }

    out: Path = Path("runs/first")
    seed: int = 0
    note: str = ""
    clip: tuple[float, float] = (0.8, 1.2)
    weights: dict[str, float] = field(default_factory=dict)
    sft: Stage = Stage()


@dataclass(frozen=True, kw_only=True)
class Talk:
    first: str = field(metadata={"positional": True})
    others: tuple[str, ...] = field(default=(), metadata={"positional": True})
    temperature: float = 1.0


def parsed(*words: str) -> Recipe:
    return parse(Recipe, words, prog="tercet test")


def test_without_any_word_the_defaults_stand():
    assert parsed() == Recipe()


@pytest.mark.parametrize(
    "words",
    [
        ["--sft.learning-rate", "1e-4"],
        ["--sft.learning_rate", "1e-4"],
        ["--sft.learning-rate=1e-4"],
        ["sft.learning_rate=1e-4"],
        ["sft.learning-rate=1e-4"],
    ],
)
def test_a_nested_setting_can_be_given_in_each_way_people_type_it(words):
    assert parsed(*words) == Recipe(sft=Stage(learning_rate=1e-4))


def test_flags_win_over_files_and_files_over_presets_and_presets_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("seed: 5\nsft:\n  learning_rate: 5e-4\n  max_steps: 7\n")
    recipe = parsed("--sft.max-steps", "9", "--config", str(file), "--preset", "large")
    assert recipe == Recipe(seed=5, sft=Stage(learning_rate=5e-4, max_steps=9, lora=LoraConfig(rank=64)))


def test_the_last_of_two_equal_flags_wins():
    assert parsed("--seed", "1", "seed=2").seed == 2


def test_a_check_of_the_config_sees_only_the_final_value(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sft.learning_rate: -1\n")
    assert parsed("--config", str(file), "--sft.learning-rate", "1").sft.learning_rate == 1.0
    with pytest.raises(ConfigError, match="^sft: learning_rate is -1.0; it must be above 0$"):
        parsed("--config", str(file))


def test_truth_values_are_switched_by_name_by_no_name_and_by_value():
    assert parsed("--no-sft.pack").sft.pack is False
    assert parsed("--sft.pack", "false", "--seed", "3") == Recipe(seed=3, sft=Stage(pack=False))
    assert parsed("sft.pack=false", "--sft.pack").sft.pack is True


def test_a_list_takes_words_up_to_the_next_flag_or_a_yaml_list():
    assert parsed("--sft.lora.targets", "q_proj", "v_proj", "seed=4").sft.lora == LoraConfig(
        targets=("q_proj", "v_proj")
    )
    assert parsed("--sft.stop", "[END, 13]").sft.stop == ("END", 13)
    assert parsed("--sft.stop").sft.stop == ()
    assert parsed("--clip", "0.5", "2").clip == (0.5, 2.0)


def test_a_list_of_pairs_ends_where_a_setting_is_named():
    assert parsed("--sft.stop", "a=b", "c", "d-e=f", "seed=4") == Recipe(seed=4, sft=Stage(stop=("a=b", "c", "d-e=f")))
    assert parsed("--sft.stop", "a=b", "weights.x=2") == Recipe(weights={"x": 2.0}, sft=Stage(stop=("a=b",)))
    with pytest.raises(ConfigError, match="unknown setting 'sede'"):
        parsed("--sft.stop", "END", "sede=4")


def test_none_switches_a_group_off_and_a_setting_of_it_switches_it_on():
    assert parsed("--sft.lora", "none").sft.lora is None
    assert parsed("--sft.lora", "none", "--sft.lora.rank", "4").sft.lora == LoraConfig(rank=4)
    assert from_mapping(Recipe, {"sft": {"lora": {"rank": 4}}}, Recipe(sft=Stage(lora=None))).sft.lora == LoraConfig(
        rank=4
    )


def test_negative_numbers_and_equals_signs_are_values():
    assert parsed("--seed", "-3").seed == -3
    assert parsed("--note", "a=b").note == "a=b"
    assert parsed("--note=--x").note == "--x"


def test_names_of_the_users_choosing_keep_their_hyphens_and_dots():
    assert parsed("--weights.smollm2-1.7b", "2", "weights.x=1e-1").weights == {"smollm2-1.7b": 2.0, "x": 0.1}


def test_positional_settings_are_taken_in_order_and_the_last_list_takes_the_rest():
    talk = parse(Talk, ["base", "sft", "rl", "--temperature", "0"], prog="tercet test")
    assert talk == Talk(first="base", others=("sft", "rl"), temperature=0.0)
    with pytest.raises(ConfigError, match="first is not set"):
        parse(Talk, [], prog="tercet test")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sft.lerning-rate", "1"], "unknown setting 'sft.lerning-rate'; did you mean 'sft.learning_rate'?"),
        (["--learning-rate", "1"], "unknown setting 'learning-rate'; did you mean 'sft.learning_rate'?"),
        (["sead=1"], "unknown setting 'sead'; did you mean 'seed'?"),
        (["--seed.x", "1"], "unknown setting 'seed.x'; did you mean 'seed'?"),
        (["--preset", "larg"], "unknown preset 'larg'; did you mean 'large'?"),
        (["--seed", "many"], "seed is 'many'; it must be a whole number"),
        (["--seed", "1.5"], "seed is '1.5'; it must be a whole number"),
        (["--sft.max-steps", "x"], "sft.max_steps is 'x'; it must be a whole number or none"),
        (["--sft.schedule", "cosin"], "sft.schedule is 'cosin'; it must be one of linear, cosine"),
        (["--sft.pack=maybe"], "sft.pack is 'maybe'; it must be true or false"),
        (["--clip", "1"], "clip is '1'; it must be 2 items, each a number"),
        (["--clip", "1", "x"], "clip[1] is 'x'; it must be a number"),
        (["--sft.lora.rank", "0"], "sft.lora: rank is 0; it must be at least 1 (16 is usual)"),
        (["--sft", "3"], "sft is '3'; it must be a group of settings"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--note", "x"], "--seed needs a value"),
        (["stray"], "'stray' was not expected here; a setting is given as --name value or name=value"),
    ],
)
def test_a_wrong_word_is_refused_with_what_was_got_and_what_is_wanted(words, message):
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft:\n  lerning_rate: 1\n", "unknown setting 'sft.lerning_rate'; did you mean 'sft.learning_rate'?"),
        ("seed: true\n", "seed is True; it must be a whole number"),
        ("seed: 2.0\n", "seed is 2.0; it must be a whole number"),
        ("seed:\n", "seed is None; it must be a whole number"),
        ("note: 3\n", "note is 3; it must be text"),
        ("sft: {pack: 1}\n", "sft.pack is 1; it must be true or false"),
        ("sft: 3\n", "sft is 3; it must be a group of settings"),
        ("- 1\n", "holds [1]; a config file holds 'name: value' lines"),
        ("a: [\n", "is not YAML: "),
    ],
)
def test_a_wrong_file_is_refused_and_named(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Recipe, file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read: No such file"):
        parsed("--config", str(tmp_path / "nowhere.yaml"))


def test_a_file_may_use_hyphens_dots_and_numbers_that_yaml_takes_for_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sft.learning-rate: 1e-4\nsft:\n  max-steps: 3\n")
    assert load(Recipe, file) == Recipe(sft=Stage(learning_rate=1e-4, max_steps=3))


def test_an_empty_file_changes_nothing_of_the_base(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("")
    assert load(Recipe, file, Recipe(seed=3)) == Recipe(seed=3)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(out=Path("a b"), seed=-1, note="1e-4", clip=(1e-12, float("inf")), weights={"a.b-c": 0.1}),
        Recipe(note="null", sft=Stage(lora=None, stop=("5", 5, "\n", "true", "é"), max_steps=0, pack=False)),
        Recipe(sft=Stage(lora=LoraConfig(rank=2, targets=()))),
    ],
)
def test_what_is_written_reads_back_equal(recipe, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(recipe))
    assert load(Recipe, file) == recipe
    with pytest.raises(SystemExit) as stopped:
        parsed("--config", str(file), "--print-config")
    assert stopped.value.code == 0
    assert from_mapping(Recipe, yaml.safe_load(capsys.readouterr().out)) == recipe


def test_help_shows_name_type_docstring_and_default_of_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--seed", "broken", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "--sft.learning-rate NUMBER Peak of the schedule, in units of 100% honesty. (default: 0.0002)" in text
    assert "--sft.schedule {linear,cosine} (default: linear)" in text
    assert "--sft.lora.rank INT Rank of the update. (default: 16)" in text
    assert "One stage of the recipe." in text and "start from these settings: large" in text


def test_differences_are_dotted_names_of_what_is_changed_added_or_gone():
    old = to_mapping(Recipe(weights={"a": 1.0}))
    new = to_mapping(Recipe(seed=1, weights={"b": 1.0}, sft=Stage(lora=None)))
    assert differences(old, new) == ["seed", "weights.a", "weights.b", "sft.lora"]
    assert differences(old, old) == []


def test_a_word_that_is_near_nothing_gets_the_whole_list():
    assert suggestion("zzz", ["sft", "rl"]) == "known are: sft, rl"
