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
    assert len(rows) == 15
    for name, row in rows.items():
        assert f"(`{name}`)" in table
        ours = row["sides"]["tercet"]
        assert ours["tokens"] > 0 and ours["median_seconds"] > 0 and 50 < ours["rss_mb"] < 4000
        assert len(ours["seconds"]) == 1
        assert row["machine"]["threads"] >= 1 and ours["gemm_library"] in ("mkl", "onednn")
        assert all(side["versions"]["torch"] and side["versions"]["python"] for side in row["sides"].values())
    assert rows["length"]["sides"]["tercet"]["tokens"] == 2 * (8 + 16 + 32)


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


def bench(*words: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/run.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_numbers_of_kept_rows_are_compared_anew_by_what_may_differ_today(tmp_path):
    output = tmp_path / "results.json"
    kept = json.loads((ROOT / "benchmarks" / "results.json").read_text())["rows"]
    names = set(kept)
    kept["gradient"]["differ"] = {"loss": 1.0}  # outdated: the sides agree
    output.write_text(json.dumps({"rows": kept}))
    words = ("--smoke", "--together", "--only", "tournament", "--output", str(output))
    done = bench(*words)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert set(rows) == names | {"tournament"} and rows["gradient"]["differ"] == {}
    assert all(f"(`{name}`)" in done.stdout for name in names)

    rows["gradient"]["sides"]["padded"]["same"]["loss"] *= 1.5
    output.write_text(json.dumps({"rows": rows}))
    assert bench(*words).returncode == 1
    assert set(json.loads(output.read_text())["rows"]["gradient"]["differ"]) == {"loss"}


def test_rows_run_with_random_weights_in_another_dtype_and_stay_apart_from_others(tmp_path):
    output = tmp_path / "bfloat16.json"
    elsewhere = ("--dtype", "bfloat16", "--random-size", "smallest")
    done = bench("--smoke", "--together", "--device", "cpu", *elsewhere, "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert set(rows) == {
        "gradient", "gradient-sorted", "mfu", "rl", "tournament", "dpo", "reward", "sft", "decode", "bandwidth",
    }  # fmt: skip
    assert rows["mfu"]["value"] > 0 and rows["bandwidth"]["value"] > 0
    # Rounded to 8 bits here and there, so not equal; but the same gradient.
    assert 0 < rows["gradient"]["apart"]["gradient_norm"] < 0.1
    assert rows["sft"]["setting"] == {"device": "cpu", "dtype": "bfloat16", "random_size": "smallest"}

    done = bench("--smoke", "--only", "sft", "--output", str(output))
    assert done.returncode == 2 and "rows of another device, dtype or size" in done.stderr
    done = bench("--smoke", "--only", "memory", *elsewhere)
    assert done.returncode == 2 and "memory: measured on a CPU in float32 alone" in done.stderr


def said(program: str) -> dict:
    """What a program that imports the benchmarks prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRIAL = """
import json, tempfile
from dataclasses import replace
from pathlib import Path
from measuring import SideProcess, Trial
from rows import ROWS
from run import least_memory
from work import build, write
from tercet.models.names import resolve
import sys

file = Path(tempfile.mkdtemp()) / "work.json"

def start(side, work):
    write(work, file)
    return SideProcess(sys.executable, "sft", side, file, 1)

row = replace(ROWS["sft"], trial=Trial("tercet", "rank"))
work = build(str(resolve("tiny")), None, smoke=True).with_settings(rank_tried=(4096, 2))
given, tried = least_memory(row, work, start)
print(json.dumps({"given": given.settings["rank"], **tried}))
"""


def test_the_choice_of_least_memory_is_found_though_a_larger_one_was_tried_before():
    found = said(TRIAL)
    assert found["given"] == found["taken"] == 2
    large, small = (found["choices"][rank]["rss_mb"] for rank in ("4096", "2"))
    # 2 layers of 64 x 64, 2 of 32 x 64, 3 of 128 x 64 are 4096 x 1,600 numbers of 4 bytes; with gradient, m and v.
    assert large - small > 100


SETTINGS = """
import json
from memory import trl_settings
from trl_steps import settings
from work import build
from tercet.models.names import resolve

work = build(str(resolve("tiny")), None, smoke=True)
on_cuda = settings(work.with_settings(device="cuda", dtype="bfloat16"), 4)
saving = trl_settings(work.with_settings(memory_rows=2), checkpointing=True)  # of 2 groups of 2
print(json.dumps({"plain": settings(work, 4), "cuda": on_cuda, "saving": saving}))
"""


def test_trl_is_told_where_to_compute_and_saves_memory_where_memory_is_measured():
    found = said(SETTINGS)
    names = ("use_cpu", "bf16", "gradient_checkpointing", "per_device_train_batch_size")
    assert [found["plain"][name] for name in names] == [True, False, False, 4]
    assert [found["cuda"][name] for name in names] == [False, True, False, 4]
    assert [found["saving"][name] for name in names] == [True, False, True, 2]


TIMED_TWICE = """
import json, time
from decode import fastest_of, step_bytes
from local import engine
from work import build
from tercet.models.names import resolve

calls = []

def run(size):
    # The smaller one is slow the first time, as whatever is done first in a process.
    time.sleep(0.4 if size == 32 and not calls else 0.01 if size == 32 else 0.1)
    calls.append(size)

best = fastest_of((32, 64), run)
model = engine(build(str(resolve("tiny")), None, smoke=True)).model
bytes_ = {n: step_bytes(model, [[0] * 3, [0] * 5], n, 3) for n in (1, 2)}
weights = sum(p.numel() for p in model.parameters())
print(json.dumps({"best": best, "calls": calls, "bytes": bytes_, "weights": weights}))
"""


def test_batch_sizes_are_timed_twice_in_turns_and_the_bytes_of_steps_are_counted():
    found = said(TIMED_TWICE)
    assert found["best"] == 32 and found["calls"] == [32, 64, 32, 64]
    # Two steps. A token's keys and values: 2 x 2 layers x 2 heads x 16 numbers. Prompts: 2 x 8; own: 2 rows, 1 + 2.
    assert found["bytes"]["1"] == 4 * (2 * found["weights"] + 128 * (16 + 6))
    assert found["bytes"]["2"] - found["bytes"]["1"] == 4 * 128 * 6


KIND = """
import json
from profile_steps import kind, operations

sizes = {"vocabulary": 512, "rank": 16}
linear = "mkldnn::_linear_pointwise"
print(json.dumps({
    "linear": operations(linear, [[10, 64], [128, 64], [], [], [], []]),
    "gated": operations(linear, [[10, 64], [10, 128], [128, 64], [], []]),
    "batched": operations("aten::bmm", [[2, 3, 4], [2, 4, 5]]),
    "added": operations("aten::addmm_", [[10, 64], [10, 16], [16, 64]]),
    "kinds": [
        kind(linear, [], [[10, 64], [128, 64], []], **sizes),
        kind(linear, ["_LoraLinear"], [[10, 64], [16, 64], []], **sizes),
        kind(linear, ["_FrozenHead"], [[10, 64], [512, 64], []], **sizes),
        kind("aten::bmm", ["_ForestAttention"], [[2, 3, 4], [2, 4, 5]], **sizes),
        kind("aten::exp", ["_FrozenHead"], [[8, 512]], **sizes),
        kind("aten::mul", ["_RmsNormBackward"], [[8, 64], [64]], **sizes),
        kind("aten::copy_", ["aten::contiguous", "_ForestAttention"], [[8, 64]], **sizes),
        kind("aten::add", ["drawing"], [[8]], **sizes),
    ],
}))
"""


def test_operations_of_a_profile_are_counted_and_sorted_by_kind():
    found = said(KIND)
    assert found["linear"] == found["gated"] == 2 * 10 * 64 * 128
    assert (found["batched"], found["added"]) == (2 * 2 * 3 * 4 * 5, 2 * 10 * 16 * 64)
    assert found["kinds"] == [
        "frozen weights", "adapters", "head", "attention's products", "softmax over the vocabulary",
        "norms and gates", "moving and copying", "drawing",
    ]  # fmt: skip


def test_a_profile_of_a_decode_call_and_a_step_is_written_as_a_table_and_json(tmp_path):
    output = tmp_path / "profile.json"
    command = [sys.executable, "benchmarks/profile_steps.py", "--smoke", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".txt").read_text() in done.stdout
    decode, sft = (json.loads(output.read_text())["profiled"][name]["kinds"] for name in ("decode", "sft"))
    for kinds in (decode, sft):
        assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
        assert all(kinds[name]["gflops"] > 0 for name in ("frozen weights", "head", "attention's products"))
    assert decode["drawing"]["share"] > 0 and decode["adapters"]["gflops"] is None
    assert sft["optimizer"]["share"] > 0 and sft["adapters"]["gflops"] > 0 and sft["norms and gates"]["share"] > 0


def test_gradients_in_float32_are_as_near_to_float64_as_float32_allows(tmp_path):
    output = tmp_path / "error.json"
    command = [sys.executable, "benchmarks/gradient_error.py", "--smoke", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["relative_error"]
    assert set(found) == {"tercet", "transformers"} and all(1e-9 < far < 1e-5 for far in found.values())


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
from work import build
from tercet.models.names import resolve

work = build(str(resolve("tiny")), None, smoke=True)
measured(lambda: Run(1.0, 1, 0.0, {"loss": float("nan")}), work)
"""


@pytest.mark.parametrize(("program", "why"), [(FAILS, "EngineError"), (STRAYS, "not finite")])
def test_a_step_that_fails_or_gives_no_number_is_an_error_and_not_a_time(program, why):
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert why in done.stderr
