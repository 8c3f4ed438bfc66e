"""The benchmarks run; what they say of time is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[str, dict]:
    output = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [sys.executable, "benchmarks/run.py", "--smoke", "--together", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())["rows"]


def test_every_row_runs_its_own_side_and_is_in_the_table(measured):
    table, rows = measured
    assert len(rows) == 13
    for name, row in rows.items():
        assert f"(`{name}`)" in table
        ours = row["sides"]["tercet"]
        assert ours["tokens"] > 0 and ours["median_seconds"] > 0 and 50 < ours["rss_mb"] < 4000
        assert len(ours["seconds"]) == 1
        assert row["machine"]["threads"] >= 1 and row["versions"]["torch"]


def test_both_sides_compute_the_same(measured):
    _, rows = measured
    assert set(rows["gradient"]["apart"]) == {"loss", "gradient_norm", "gradient_direction"}
    assert set(rows["gradient-sorted"]["apart"]) == set(rows["gradient"]["apart"])
    assert len(rows["tournament"]["apart"]) == 24  # both labels of twelve matches
    assert all(not row["differ"] for row in rows.values())
    assert rows["decode"]["sides"]["generate"]["tokens"] == rows["decode"]["sides"]["tercet"]["tokens"]


def test_a_row_is_measured_again_in_a_process_of_its_own_without_losing_the_others(measured, tmp_path):
    _, rows = measured
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"rows": rows}))
    command = [sys.executable, "benchmarks/run.py", "--smoke", "--threads", "1", "--output", str(output)]
    subprocess.run([*command, "--only", "sft"], cwd=ROOT, check=True, capture_output=True, timeout=200)
    again = json.loads(output.read_text())["rows"]
    assert again["sft"]["sides"]["tercet"]["seconds"] != rows["sft"]["sides"]["tercet"]["seconds"]
    assert {name: row for name, row in again.items() if name != "sft"} == {
        name: row for name, row in rows.items() if name != "sft"
    }


def test_real_measurements_want_data():
    done = subprocess.run([sys.executable, "benchmarks/run.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--data is missing" in done.stderr


FAILS = """
from dataclasses import replace
from rows import ROWS
from work import build
from tercet.models.names import resolve

work = build(str(resolve("tiny")), None, smoke=True)
ROWS["reward"].sides["tercet"](replace(work, pairs=[{**work.pairs[0], "chosen": " too" * 5000}]))()
"""
STRAYS = """
from measuring import Run, measured

measured(lambda: Run(1.0, 1, 0.0, {"loss": float("nan")}), True)
"""


@pytest.mark.parametrize(("program", "why"), [(FAILS, "EngineError"), (STRAYS, "not finite")])
def test_a_step_that_fails_or_gives_no_number_is_an_error_and_not_a_time(program, why):
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert why in done.stderr
