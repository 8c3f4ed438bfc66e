from __future__ import annotations

import re
import socket
import time

import pytest
import torch

from tercet.cli import doctor
from tercet.models.memory import estimate, shape
from tercet.recipes.rlhf import RLHFConfig


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_machine_that_passes_these_tests_is_healthy(no_hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.main(["--out", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "The core works: tercet rlhf can run here." in text
    assert "switched off by HF_HUB_OFFLINE" in text
    assert re.search(r"torch +│ \d+\.\d+", text) and re.search(r"[\d,]+ GFLOP/s", text)


def test_the_tested_versions_name_every_library_of_the_core():
    assert {name.lower() for name in doctor.CORE} <= set(doctor.tested_versions())


def test_a_missing_library_is_broken_another_version_noted_and_a_build_of_the_tested_one_fine():
    installed = {name: "1.0" for name in doctor.CORE} | {"torch": "2.0+cpu", "rich": "0.9"}
    del installed["peft"]
    tested = {name.lower(): "1.0" for name in doctor.CORE} | {"torch": "2.0"}
    found = {finding.what: finding for finding in doctor.libraries(installed, tested)}
    assert (found["peft"].state, found["peft"].advice) == ("broken", "pip install peft==1.0")
    assert (found["rich"].state, found["torch"].state, found["PyYAML"].state) == ("note", "fine", "fine")


def test_little_memory_is_noted_with_what_the_default_run_takes():
    assert (doctor.memory(64.0).state, doctor.memory(1.0).state) == ("fine", "note")
    assert (taken := re.search(r"the default run takes about (\d\.\d)$", doctor.memory(1.0).found))
    assert (less := re.search(r"takes about (\d\.\d)$", doctor.memory(1.0).advice))
    assert 1 < float(less[1]) < float(taken[1]) < 7


def test_on_a_gpu_its_own_memory_counts_and_pythons_does_not():
    fine, short = doctor.memory(1.0, 24.0, dtype="bfloat16"), doctor.memory(64.0, 1.0, dtype="bfloat16")
    assert (fine.what, fine.state, short.what, short.state) == ("GPU memory", "fine", "GPU memory", "note")
    assert fine.found.startswith("24 GiB; ") and short.found.startswith("1 GiB; ")
    sizes = {"gpu_gib": 24.0, "dtype": "bfloat16"}
    estimated = estimate(
        shape(doctor.SMOLLM2), micro_batch_tokens=512, sampled_rows=20, row_tokens=560, longest_tokens=512, tied=2,
        dtype="bfloat16", on_cpu=False,
    )  # fmt: skip
    run = RLHFConfig()
    assert (run.rl.completions_per_step, run.rl.max_prompt_length + run.rl.max_tokens) == (20, 560)
    assert doctor.default_run_gib(512, 512, **sizes) * 2**30 == pytest.approx(estimated.total)


def test_more_threads_than_cores_are_noted():
    facts = {"cpus": 4.0, "cores": 2, "cpu": "x", "gpus": [], "variables": {"OMP_NUM_THREADS": "8"}}
    found = {finding.what: finding for finding in doctor.machine(facts)}
    assert found["threads"].advice == "more than cores: unset OMP_NUM_THREADS, or set it to 2"
    assert found["GPU"].found == "none; the CPU does the work"
    unset = {finding.what: finding for finding in doctor.machine({**facts, "variables": {}})}
    assert (unset["threads"].found, unset["threads"].state) == ("2 of a sensible 2", "fine")


def test_the_disk_of_runs_that_are_not_there_yet_is_that_of_the_nearest_directory(tmp_path):
    assert doctor.disk(tmp_path / "a" / "b").found.endswith(f"free in {tmp_path}")


def test_a_hub_that_never_answers_costs_no_more_than_the_time_allowed(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        finding = doctor.hub(0.2)
    assert time.monotonic() - started < 2
    assert finding.state == "note" and finding.found.startswith("cannot be reached: ")


def test_a_refused_connection_is_told_with_its_reason(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    assert "refused" in doctor.hub(2.0).found


def test_the_speed_of_training_is_half_that_of_reading():
    found = doctor.speed(torch, "cpu", "float32").found
    read, learned = (float(n.replace(",", "")) for n in re.findall(r"([\d,]+) and learns from ([\d,]+)", found)[0])
    assert read == pytest.approx(2 * learned, abs=2)


def test_the_size_of_the_built_in_model_follows_from_its_shape():
    # 49,152 words of width 576 (tied), 30 layers with 9 query and 3 key-value heads of 64, MLP of 1,536.
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert shape(doctor.SMOLLM2).parameters == 49_152 * 576 + 30 * layer + 576 == 134_515_008
