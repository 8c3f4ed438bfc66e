"""`tercet rlhf` from its first line to its last, and what it says when it will not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.commands import learned, measured, written


def test_it_ends_with_every_stage_an_evaluation_and_a_report(finished: Path):
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml", "sft", "preference", "judge", "rl", "evaluation.json", "report.html",
    }  # fmt: skip
    evaluation = json.loads((finished / "evaluation.json").read_text())
    rates = {(row["policy"], row["against"], row["judge"]) for row in evaluation["win_rates"]}
    assert {("rl", "sft", "preference"), ("rl", "sft", "held_out"), ("rl", "chosen", "preference")} <= rates
    assert set(evaluation["judges"]) == {"preference", "held_out"}
    assert set(evaluation["policies"]) == {"base", "sft", "rl"}
    assert evaluation["policies"]["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    assert len(evaluation["samples"]) == 3
    assert "<svg" in (finished / "report.html").read_text()


def test_it_says_at_the_start_what_it_will_do_and_at_the_end_what_came_of_it(finished: Path):
    said = (finished.parent / "said.txt").read_text()
    assert "model: tiny, 0.107 million weights, on cpu (float32, 1 thread), renderer chat_template" in said
    assert "sft: 4 steps of 8 conversations, of which there are 27; about" in said
    assert "rl: 3 steps of 2 prompts x 4 answers = 8 answers, which meet in 24 matches (soft verdicts)" in said
    end = said[said.index("evaluation:") :]
    for words in ("RL wins against SFT", "95% interval", "Preference accuracy", "Held-out NLL, start to end"):
        assert words in end, words
    for line in (
        f"report             {finished / 'report.html'}",
        f"talk to it         tercet chat {finished}",
        f"take it elsewhere  tercet export {finished} --out DIRECTORY",
    ):
        assert line in end.splitlines()


def test_prompts_that_are_held_out_are_not_learned(finished: Path):
    asked = {row["prompt"][-1]["content"] for row in measured(finished / "rl") if "prompt" in row}
    evaluation = json.loads((finished / "evaluation.json").read_text())
    held_out = {sample["prompt"][-1]["content"] for sample in evaluation["samples"]}
    assert asked and held_out and not asked & held_out


def test_the_printed_config_reads_back_to_the_same_config(tercet, small, tmp_path: Path):
    words = ("rlhf", "--preset", "no-robots-hhh", *small, "rl.kl_coef=1e-3", "--sft.test-data", "none")
    printed = tercet(*words, "--print-config").out
    (tmp_path / "mine.yaml").write_text(printed)
    assert tercet("rlhf", "--config", tmp_path / "mine.yaml", "--print-config").out == printed
    assert yaml.safe_load(printed)["rl"]["kl_coef"] == 1e-3


def test_the_config_a_run_keeps_makes_the_same_run(finished: Path, tercet, tmp_path: Path):
    again = tmp_path / "again"
    tercet("rlhf", "--config", finished / "config.yaml", "--out", again)
    for stage in ("sft", "preference", "judge", "rl"):
        assert learned(again / stage) == learned(finished / stage)
        assert measured(again / stage) == measured(finished / stage)
    assert (again / "evaluation.json").read_bytes() == (finished / "evaluation.json").read_bytes()


def test_what_is_done_is_not_done_again(finished: Path, tercet, small):
    before = written(finished)
    said = tercet("rlhf", "--out", finished, *small).out
    for stage in ("sft", "preference", "judge", "rl"):
        assert f"{stage}: done before, in {finished / stage}" in said
    after = written(finished)
    assert {name for name in after if after[name] != before.get(name)} == {"report.html"}


def test_a_changed_config_is_refused_by_name_before_anything_is_done(finished: Path, tercet, small):
    before = written(finished)
    refused = tercet("rlhf", "--out", finished, *small, "rl.group_size=6", "--seed", 3, code=2)
    assert "rl.group_size: 4 there, 6 now" in refused.err and "seed: 0 there, 3 now" in refused.err
    assert written(finished) == before


def test_what_moves_no_number_may_change(finished: Path, tercet, small):
    assert "sft: done before" in tercet("rlhf", "--out", finished, *small, "--threads", 2).out
    tercet("rlhf", "--out", finished, *small)  # put back


def test_data_that_changed_behind_an_unchanged_name_are_refused(tercet, rows, tmp_path: Path):
    mine = tmp_path / "mine.jsonl"
    lines = rows.conversations.read_text().splitlines(keepends=True)
    mine.write_text("".join(lines))
    words = ("sft", "--model", "tiny", "--threads", 1, "--data", mine, "--max-steps", 1, "--out", tmp_path / "run")
    tercet(*words)
    mine.write_text("".join(lines[1:]))
    assert "rows_sha256: " in tercet(*words, code=2).err


def test_an_unknown_setting_is_refused_with_the_nearest(tercet):
    assert tercet("rlhf", "--sft.lerning-rate", 1, code=2).err == (
        "tercet: unknown setting 'sft.lerning-rate'; did you mean 'sft.learning_rate'?\n"
    )
    assert "did you mean 'no-robots-hhh'?" in tercet("rlhf", "--preset", "no-robot-hhh", code=2).err
    assert "no-robots-hhh" in tercet("rlhf", "--help").out


def test_answers_too_long_for_the_judge_are_refused_before_training(tercet, small, tmp_path: Path):
    refused = tercet("rlhf", "--out", tmp_path / "run", *small, "rl.max_tokens=500", code=2)
    assert "two answers of 500 tokens" in refused.err
    assert not (tmp_path / "run/sft").exists()


def test_full_fine_tuning_goes_the_whole_road(tercet, small, tmp_path: Path):
    root = tmp_path / "run"
    tercet("rlhf", "--out", root, *small, "--method", "full", "held_out_judge=0")
    assert not (root / "judge").exists()
    done = json.loads((root / "rl/done.json").read_text())
    assert (root / "rl" / done["checkpoint"] / "model.safetensors").exists()
    assert learned(root / "rl") != learned(root / "sft")
    said = tercet("generate", "--policy", root / "rl", "--rows", 1, "--max-tokens", 4, "--out", root / "a.jsonl").out
    assert str(root / "a.jsonl") in said


def test_base_models_go_the_whole_road_with_role_colon(tercet, small, tmp_path: Path):
    root = tmp_path / "run"
    said = tercet("rlhf", "--out", root, *small, "--renderer", "role_colon").out
    assert "renderer role_colon" in said
    assert "renderer role_colon" in tercet("eval", root, "--rows", 2, "--max-tokens", 4).out
