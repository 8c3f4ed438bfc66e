"""The table of all algorithms, on the model `tiny`: what is compared with what, not who wins."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tercet import data
from tercet.recipes.rows import rows_sha256
from tests.e2e.commands import learned, written

ROOT = Path(__file__).parents[2]
FEW_STEPS = (
    "reward.max_steps=2", "ppo.steps=2", "ppo.prompts_per_step=4", "ppo.ppo-epochs=1", "ppo.mini_batch_size=4",
    "rebel.prompts=4", "rebel.answers.n=2", "simpo.max_steps=2",
)  # fmt: skip
Ended = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def algorithms(finished: Path, tmp_path_factory) -> Callable[..., Ended]:
    out = tmp_path_factory.mktemp("algorithms") / "out"

    def run(*words: str) -> Ended:
        few = [word for each in FEW_STEPS for word in ("--set", each)]
        command = [sys.executable, "benchmarks/algorithms.py", "--run", str(finished), "--out", str(out), *few, *words]
        return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=3600)

    return run


@pytest.fixture(scope="module")
def table(algorithms) -> tuple[str, Path]:
    """The table of the algorithms that sample, and the folder."""
    done = algorithms("--only", "policy_gradient", "ppo", "rebel")
    assert done.returncode == 0, done.stderr
    return done.stdout, Path(done.args[done.args.index("--out") + 1])


def found(out: Path) -> dict:
    return json.loads((out / "algorithms.json").read_text())


def test_every_algorithm_has_a_row_with_both_judges_kl_length_time_and_memory(table):
    text, out = table
    rows = found(out)["algorithms"]
    assert list(rows) == ["sft", "policy_gradient", "ppo", "rebel"]
    for name, row in rows.items():
        assert name == "sft" or set(row["win_rates"]) == {"preference", "held_out"}
        assert name == "sft" or (row["minutes"] > 0 and 0.05 < row["peak_gib"] < 4)
        assert len(row["answers"]) == 3 and 1 <= row["mean_length"] <= 8 and row["score_std"] > 0
    assert rows["sft"]["score_gain"] == rows["sft"]["kl"] == 0
    assert len(found(out)["ppo"]["kl"]) == 2 and found(out)["ppo"]["target"] == 6
    assert text == (out / "algorithms.md").read_text()
    assert all(f"| {title} |" in text for title in ("SFT policy", "policy gradient", "PPO", "REBEL"))


def test_what_learns_from_comparisons_sees_those_of_the_preference_model_and_none_of_the_held_out_judges(
    table, finished: Path
):
    _, out = table
    [share] = {
        yaml.safe_load((run / "origin.yaml").read_text())["rows_sha256"]
        for run in (finished / "preference", out / "reward")
    }
    assert rows_sha256(data.load_comparisons(str(out / "data/comparisons.jsonl")).rows) == share


def test_a_run_whose_comparisons_are_gone_is_refused(algorithms, finished: Path, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "preference/origin.yaml").write_text("rows_sha256: of-another-day\n")
    done = algorithms("--run", str(run), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "no longer gives the comparisons" in done.stderr


def test_the_comparison_is_the_one_that_the_run_made_and_the_policy_gradient_its_own(table, finished: Path):
    _, out = table
    samples = json.loads((finished / "evaluation.json").read_text())["samples"]
    rows = found(out)["algorithms"]
    assert rows["sft"]["answers"] == [each["answers"]["sft"] for each in samples]
    assert learned(out / "policy_gradient") == learned(finished / "rl")
    assert rows["policy_gradient"]["answers"] == [each["answers"]["rl"] for each in samples]


def test_rebel_is_measured_by_its_last_iteration(table):
    _, out = table
    assert learned(out / "rebel/iteration-1") != learned(out / "rebel/iteration-2")
    assert found(out)["algorithms"]["rebel"]["folder"] == str(out / "rebel/iteration-2")


def test_another_algorithm_joins_without_the_others_being_done_again(table, algorithms):
    _, out = table
    before, files = found(out)["algorithms"], written(out)
    done = algorithms("--only", "simpo", "ppo")
    assert done.returncode == 0, done.stderr
    assert "ppo: done before" in done.stderr and "simpo answers" in done.stderr and "ppo answers" not in done.stderr
    after = found(out)["algorithms"]
    assert after.pop("simpo")["win_rates"] and after == before
    changed = {name for name, stamp in written(out).items() if files.get(name) != stamp}
    assert {name.partition("/")[0] for name in changed} == {
        "simpo",
        "simpo.json",
        "algorithms.json",
        "algorithms.md",
    }


def test_a_goal_is_reached_beyond_its_bound_and_without_a_time_only_the_win_rate_is_asked_for():
    goals = runpy.run_path(str(ROOT / "benchmarks/algorithms_table.py"))["goals"]

    def row(rate: float, minutes: float | None) -> dict:
        return {"win_rates": {"held_out": {"win_rate": rate}}, "minutes": minutes, "score_gain": 1.25}

    told = {
        "algorithms": {"ppo": row(0.61, 15.0), "rebel": row(0.60, None)},
        "judges": {"reward": {"accuracy": 0.80}},
        "ppo": {"target": 6, "kl_max": 12.5},
    }
    assert list(goals(told)) == [
        ("PPO: win rate under the held-out judge", 0.61, "> 0.60", True),
        ("PPO: minutes", 15.0, "<= 15", True),
        ("REBEL: win rate under the held-out judge", 0.60, "> 0.60", False),
        ("PPO: score gain, std", 1.25, "> 1", True),
        ("PPO: largest KL of a step, nats", 12.5, "<= 12", False),
        ("reward model: accuracy", 0.80, ">= 0.80", True),
    ]


def test_other_settings_for_what_is_done_are_refused(table, algorithms):
    done = algorithms("--only", "ppo", "--set", "ppo.target=3")
    assert done.returncode == 2 and "they differ in target=3" in done.stderr
    done = algorithms("--set", "rlhf.seed=7")
    assert done.returncode == 2 and "was made with another seed" in done.stderr
