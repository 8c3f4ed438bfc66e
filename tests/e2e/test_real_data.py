"""Real data given by path; they are not in this repository, so TERCET_DATA names the folder that has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.commands import MACHINE

DATA = Path(os.environ.get("TERCET_DATA", ""))

pytestmark = pytest.mark.skipif(
    "TERCET_DATA" not in os.environ,
    reason="TERCET_DATA is not set: a folder with hh-harmless, instruction-preferences, oasst and self-instruct",
)


@pytest.mark.parametrize("name", ["hh-harmless", "instruction-preferences"])
def test_comparisons_can_be_previewed_and_learned(tercet, tmp_path: Path, name):
    said = tercet("preview", DATA / name, "--model", "tiny").out
    assert "comparisons, written by" in said and "left out" in said
    words = ("--data", DATA / name, "--max-steps", 2, "--test-rows", 10, "--out", tmp_path / "run")
    assert "Preference accuracy" in tercet("preference", *MACHINE, *words).out


@pytest.mark.parametrize("name", ["oasst", "self-instruct"])
def test_conversations_can_be_previewed_and_learned(tercet, tmp_path: Path, name):
    said = tercet("preview", DATA / name, "--model", "tiny", "--kind", "conversations").out
    assert "conversations, written by" in said
    words = ("--data", DATA / name, "--max-steps", 2, "--test-rows", 10, "--out", tmp_path / "run")
    assert "Held-out NLL" in tercet("sft", *MACHINE, *words).out


def test_the_whole_road_can_be_gone_on_real_comparisons(tercet, tmp_path: Path):
    source = DATA / "instruction-preferences"
    words = (f"sft.data={source}", f"preference.data={source}", f"rl.data={source}", "sft.max_steps=2",
             "preference.max_steps=2", "judge.max_steps=2", "rl.steps=1", "rl.max_tokens=8", "preference.test_rows=10",
             "evaluation.prompts=4", "evaluation.max_tokens=8")  # fmt: skip
    assert "RL wins against SFT" in tercet("rlhf", *MACHINE, *words, "--out", tmp_path / "run").out
