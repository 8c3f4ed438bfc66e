"""The tutorial is a notebook that marimo finds nothing wrong with, and runs as a script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "tutorials/rlhf.py"


@pytest.fixture(scope="module")
def said() -> str:
    """What the tutorial prints when it runs as a script on the model `tiny`."""
    pytest.importorskip("marimo")
    command = [sys.executable, str(NOTEBOOK), "--", "--model", "tiny", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_marimo_finds_nothing_wrong():
    pytest.importorskip("marimo")
    done = subprocess.run(
        [sys.executable, "-m", "marimo", "check", "--strict", str(NOTEBOOK)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_model_and_the_number_of_steps_are_those_asked_for(said: str):
    assert said.startswith("tiny: ")
    assert len(re.findall(r"^SFT step", said, re.MULTILINE)) == 3
    assert len(re.findall(r"^preference step", said, re.MULTILINE)) == 3


def test_supervised_fine_tuning_makes_held_out_answers_likelier(said: str):
    [(before, after)] = re.findall(r"SFT held-out NLL (\S+) before, (\S+) after", said)
    assert float(after) < float(before)


def test_the_preference_model_learns_its_labels(said: str):
    losses = [float(loss) for loss in re.findall(r"preference step \d+  loss (\S+)", said)]
    assert losses == sorted(losses, reverse=True)
    [accuracy] = re.findall(r"preference held-out accuracy (\S+),", said)
    assert 0 <= float(accuracy) <= 1


def test_one_step_of_reinforcement_learning_makes_the_better_answers_likelier(said: str):
    [(ratio, gained)] = re.findall(r"RL one step: ratio (\S+), advantage-weighted change (\S+) nats", said)
    assert float(ratio) == pytest.approx(1, abs=1e-3)
    assert float(gained) > 0


def test_the_run_ends_with_a_win_rate_and_its_interval(said: str):
    [(rate, low, high)] = re.findall(r"RL held-out win rate (\S+) \((\S+) to (\S+)\) against SFT, n 16", said)
    assert 0 <= float(low) <= float(rate) <= float(high) <= 1
