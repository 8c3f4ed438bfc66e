"""The examples run as a reader would run them, and their numbers move."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *words: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--model", "tiny", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(key: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{key} ([-+]?\d+\.\d+)", text)]


@pytest.mark.parametrize("name", ["sft_loop.py", "rl_loop.py"])
def test_an_example_has_under_150_lines(name: str):
    assert len((EXAMPLES / name).read_text().splitlines()) < 150


def test_the_sft_loop_makes_held_out_answers_likelier_and_keeps_the_adapter(tmp_path: Path):
    said = run("sft_loop.py", "--steps", 12, "--learning-rate", 5e-3, "--out", tmp_path / "adapter")
    losses, (before, after) = numbers("loss", said), numbers("held-out NLL", said)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.05
    assert after < before - 0.05
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.rglob("*")}


def test_the_rl_loop_raises_a_reward_that_is_a_function_of_the_text():
    said = run(
        "rl_loop.py", "--steps", 16, "--prompts", 8, "--group", 8, "--max-tokens", 12, "--learning-rate", 1e-2
    )  # fmt: skip
    rewards, kl = numbers("reward", said), numbers("kl", said)
    [(before, after)] = re.findall(r"held-out reward (\S+) before, (\S+) after", said)
    assert len(kl) == 16
    assert sum(rewards[13:16]) / 3 > sum(rewards[:3]) / 3 + 0.01
    assert float(after) > float(before) + 0.005
    assert kl[0] == pytest.approx(0, abs=1e-3)
    assert numbers("ratio", said) == pytest.approx([1.0] * 16, abs=1e-3)


def test_the_rl_loop_trains_a_judge_and_learns_from_its_tournament():
    said = run(
        "rl_loop.py", "--reward", "tournament", "--steps", 2, "--judge-steps", 6, "--prompts", 2, "--max-tokens", 8
    )  # fmt: skip
    losses = numbers("loss", said)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    [(rate, low, high)] = re.findall(r"held-out win rate (\S+) \((\S+) to (\S+)\)", said)
    assert 0 <= float(low) <= float(rate) <= float(high) <= 1
