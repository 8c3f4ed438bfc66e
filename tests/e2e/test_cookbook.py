"""The published RLHF recipe, unmodified, against the server: short forms, where tinker-cookbook is installed.

`TERCET_COOKBOOK` names an interpreter that has it; `examples/cookbook/run.py --install FOLDER` makes one, as CI does.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parents[2] / "examples/cookbook/run.py"
PYTHON = os.environ.get("TERCET_COOKBOOK") or (sys.executable if importlib.util.find_spec("tinker_cookbook") else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="tinker-cookbook is not installed; TERCET_COOKBOOK may name who has it"
)


def command(folder: Path, *settings: str, recipe: str | None = None) -> list[str]:
    """What runs a recipe, on a server of `tiny` that is started for it."""
    words = [sys.executable, str(RUN), "--model", "tiny", "--folder", str(folder), "--python", str(PYTHON)]
    words += ["--serve", "--threads 1", "--test-rows", "2"]
    words += [] if recipe is None else ["--recipe", f"tinker_cookbook.recipes.preference.{recipe}.train"]
    return [*words, "--", *settings]


def cookbook(folder: Path, *settings: str, recipe: str | None = None) -> None:
    """Run it to its end."""
    done = subprocess.run(command(folder, *settings, recipe=recipe), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a recipe wrote of a stage."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_three_stages_of_the_published_recipe_run_unmodified(tmp_path: Path):
    words = ["max_steps=2", "batch_size=2", "rl_group_size=2", "rl_max_tokens=4", "eval_every=100", "save_every=100"]
    cookbook(tmp_path, *words)
    found = {stage: metrics(tmp_path / f"runs/rlhf-qwen3_5_9b_base/{stage}") for stage in ("sft", "rm", "rl")}
    assert all(any("train_mean_nll" in row for row in found[stage]) for stage in ("sft", "rm"))
    assert any("env/all/reward/total" in row for row in found["rl"])
    assert any("win_rate" in row for row in found["rl"])
    # The cookbook's own measure of whether sampler and trainer are one model: mean, and half the mean square, of the
    # difference of their log-probs.
    compared = [row for row in found["rl"] if "optim/kl_sample_train_v1" in row]
    assert compared
    for row in compared:
        assert abs(row["optim/kl_sample_train_v1"]) < 1e-5
        assert row["optim/kl_sample_train_v2"] < 1e-9


def test_a_recipe_that_is_killed_goes_on_from_its_checkpoint_with_another_server(tmp_path: Path):
    words = ["batch_size=2", "eval_every=1000", "save_every=1", "run_rm=False", "run_rl=False"]
    stage = tmp_path / "runs/rlhf-qwen3_5_9b_base/sft"
    saved = stage / "checkpoints.jsonl"
    quiet = subprocess.DEVNULL
    both = subprocess.Popen(
        command(tmp_path, "max_steps=100", *words), start_new_session=True, stdout=quiet, stderr=quiet
    )
    try:
        end = time.monotonic() + 240
        while not (saved.exists() and len(saved.read_text().splitlines()) >= 2):
            assert both.poll() is None and time.monotonic() < end
            time.sleep(0.1)
    finally:
        os.killpg(both.pid, signal.SIGKILL)  # server and recipe
        both.wait()
    batch = json.loads(saved.read_text().splitlines()[-1])["batch"]
    cookbook(tmp_path, f"max_steps={batch + 2}", *words)
    # The recipe cuts off what lies after its checkpoint: each step is there once.
    assert batch > 0
    assert [row["step"] for row in metrics(stage) if "train_mean_nll" in row] == list(range(batch + 2))


def test_its_dpo_begins_at_the_log_of_two_and_learns(tmp_path: Path):
    cookbook(
        tmp_path, "max_steps=4", "batch_size=4", "learning_rate=3e-3", f"log_path={tmp_path / 'dpo'}", recipe="dpo"
    )
    losses = [row["dpo_loss"] for row in metrics(tmp_path / "dpo") if "dpo_loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert min(losses[1:]) < losses[0] - 1e-3


def test_its_recipe_for_shorter_answers_judges_them_in_tournaments_and_learns_from_what_it_sampled(tmp_path: Path):
    # Its evaluation answers a thousand prompts, so it is off; its own renderer wants a tokenizer with thinking tokens.
    words = ["renderer_name=role_colon", "batch_size=2", "group_size=4", "max_tokens=16", "max_steps=2", "eval_every=0"]
    cookbook(tmp_path, *words, f"log_path={tmp_path / 'shorter'}", recipe="shorter")
    found = [row for row in metrics(tmp_path / "shorter") if "env/all/reward/total" in row]
    assert len(found) == 2
    for row in found:
        # One answer's win is another's loss; what is left of the reward is for the form.
        assert abs(row["env/all/win_minus_loss"]) < 1e-9
        assert -1 <= row["env/all/reward/total"] <= 0
        assert abs(row["optim/kl_sample_train_v1"]) < 1e-5
