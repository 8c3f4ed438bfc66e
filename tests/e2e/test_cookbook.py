"""The published RLHF recipe, unmodified, against the server: a short form, where tinker-cookbook is installed.

`TERCET_COOKBOOK` names an interpreter that has it; `examples/cookbook/run.py --install FOLDER` makes one, as CI does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "examples/cookbook/run.py"
PYTHON = os.environ.get("TERCET_COOKBOOK") or (sys.executable if importlib.util.find_spec("tinker_cookbook") else None)


@pytest.mark.skipif(PYTHON is None, reason="tinker-cookbook is not installed; TERCET_COOKBOOK may name who has it")
def test_all_three_stages_of_the_published_recipe_run_unmodified(tmp_path: Path):
    words = ["max_steps=2", "batch_size=2", "rl_group_size=2", "rl_max_tokens=4", "eval_every=100", "save_every=100"]
    command = [sys.executable, str(RUN), "--model", "tiny", "--folder", str(tmp_path), "--python", str(PYTHON)]
    command += ["--serve", "--threads 1", "--test-rows", "2", "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {
        stage: [
            json.loads(line)
            for line in (tmp_path / f"runs/rlhf-qwen3_5_9b_base/{stage}/metrics.jsonl").read_text().splitlines()
        ]
        for stage in ("sft", "rm", "rl")
    }
    assert all(any("train_mean_nll" in row for row in found[stage]) for stage in ("sft", "rm"))
    assert any("env/all/reward/total" in row for row in found["rl"])
    assert any("win_rate" in row for row in found["rl"])
    # The cookbook's own measure of whether sampler and trainer are one model: mean, and half the mean square, of the
    # difference of their log-probs.
    for row in found["rl"]:
        if "optim/kl_sample_train_v1" in row:
            assert abs(row["optim/kl_sample_train_v1"]) < 1e-5
            assert row["optim/kl_sample_train_v2"] < 1e-9
    assert any("optim/kl_sample_train_v1" in row for row in found["rl"])
