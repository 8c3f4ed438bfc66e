"""Killed at any moment and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_trainer import SAVE_EVERY_STEPS, TOTAL_STEPS, child_environment, open_run, train

from tercet.runs import final_weights, read_rows

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train(open_run(directory))
    return directory


@pytest.fixture
def quick_tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs force thousands of files to disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def ending(directory: Path) -> dict[str, object]:
    """All that must not depend on how often a run was killed."""
    weights = final_weights(directory).path
    state = json.loads((weights / "state.json").read_text())
    return {
        "model": (weights / "model.safetensors").read_bytes(),
        "optimizer": (weights / "optimizer.safetensors").read_bytes(),
        "state": state["state"],
        "next_step": state["next_step"],
        "metrics": (directory / "metrics.jsonl").read_bytes(),
        "samples": (directory / "samples.jsonl").read_bytes(),
        "checkpoints": [(row["name"], row["path"]) for row in read_rows(directory / "checkpoints.jsonl")],
        "folders": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "files": sorted(path.name for path in directory.iterdir()),
    }


def test_the_undisturbed_run_has_every_row_once_and_keeps_its_last_two_checkpoints(undisturbed: Path) -> None:
    end = ending(undisturbed)
    assert [row["step"] for row in read_rows(undisturbed / "metrics.jsonl")] == list(range(TOTAL_STEPS))
    assert [row["step"] for row in read_rows(undisturbed / "samples.jsonl")] == [
        step for step in range(TOTAL_STEPS) for _ in range(2)
    ]
    assert end["folders"] == ["step-000006", "step-000007"]
    assert end["checkpoints"] == [
        ("step-000006", "checkpoints/step-000006"),
        ("step-000007", "checkpoints/step-000007"),
        ("final", "checkpoints/step-000007"),
    ]


def test_a_run_killed_before_any_change_to_the_disk_and_resumed_ends_the_same(
    quick_tmp_path: Path, undisturbed: Path
) -> None:
    command = [sys.executable, str(HERE / "kill_everywhere.py"), str(quick_tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=child_environment())
    assert done.returncode == 0, done.stderr
    folders = sorted(quick_tmp_path.iterdir())
    # Each of the four saves alone changes the disk more than ten times.
    assert len(folders) > 10 * (TOTAL_STEPS // SAVE_EVERY_STEPS + 1)
    wanted = ending(undisturbed)
    for folder in folders:
        assert ending(folder) == wanted, f"differs after a kill in {folder.name}"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "starts.jsonl"])
def test_a_line_torn_at_any_byte_is_cut(tmp_path: Path, undisturbed: Path, name: str) -> None:
    whole = (undisturbed / name).read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    wanted = ending(undisturbed)
    for torn_at in {last + 1, (last + len(whole)) // 2, len(whole) - 2, len(whole) - 1}:
        directory = tmp_path / str(torn_at)
        train(open_run(directory), until=5)
        path = directory / name
        path.write_bytes(path.read_bytes() + whole[last:torn_at])
        train(open_run(directory))
        assert ending(directory) == wanted


def test_blocks_of_zeros_at_the_end_of_a_file_are_cut_as_a_power_cut_leaves_them(
    tmp_path: Path, undisturbed: Path
) -> None:
    train(open_run(tmp_path / "run"), until=5)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100 + b"\n" + b"\0" * 100)
    train(open_run(tmp_path / "run"))
    assert ending(tmp_path / "run") == ending(undisturbed)


def test_checkpoints_jsonl_is_repaired_when_the_kill_came_between_the_rename_and_the_row(
    tmp_path: Path, undisturbed: Path
) -> None:
    train(open_run(tmp_path / "run"), until=5)
    index = tmp_path / "run" / "checkpoints.jsonl"
    index.write_bytes(index.read_bytes().splitlines(keepends=True)[0])
    run = open_run(tmp_path / "run")
    run.start()
    assert [row["name"] for row in read_rows(index)] == ["step-000002", "step-000004"]
    run.close()


def test_a_finished_run_started_again_changes_nothing_but_reports_its_end(tmp_path: Path) -> None:
    train(open_run(tmp_path / "run"))
    before = ending(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.is_done
    start = run.start()
    assert start.step == TOTAL_STEPS
    assert start.weights == run.final_weights
    run.close()
    assert ending(tmp_path / "run") == before
