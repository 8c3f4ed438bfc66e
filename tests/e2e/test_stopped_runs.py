"""Runs that are killed, interrupted, damaged or go wrong: the same command again ends where an undisturbed run ends."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.commands import MACHINE, CommandLine, learned, measured, written

STEPS = 7
STAGES = ("sft", "preference", "rl")


@pytest.fixture(scope="session")
def command(finished: Path, rows):
    """The command of each stage, but for where it writes."""
    often = ("--save-every-steps", 2, "--eval-every-steps", 3)
    return {
        "sft": ("sft", *MACHINE, "--data", rows.conversations, "--max-steps", STEPS, "--epochs", 9,
                "--batch-size", 8, *often),
        "preference": ("preference", *MACHINE, "--data", rows.comparisons, "--max-steps", STEPS, "--epochs", 9,
                       *often),
        "rl": ("rl", *MACHINE, "--data", rows.comparisons, "--policy", finished / "sft",
               "--judge-model", finished / "preference", "--steps", STEPS, "--prompts-per-step", 2,
               "--max-tokens", 10, "evaluation.prompts=2", "evaluation.prompts_while_training=2",
               "evaluation.max_tokens=6", *often),
    }  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(tercet: CommandLine, command, tmp_path_factory) -> dict[str, Path]:
    """Each stage run to its end without a stop."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage, words in command.items():
        tercet(*words, "--out", folder / stage)
    return {stage: folder / stage for stage in command}


def stopped(tercet, words, out: Path, happened, number=signal.SIGKILL):
    """A run that was stopped before its end; where it was too quick for that, another."""
    for _ in range(10):
        ended = tercet.start(*words, "--out", out).stop_when(lambda: happened(out), number)
        if not (out / "done.json").exists():
            return ended
        shutil.rmtree(out)
    raise AssertionError("ten runs ended before they could be stopped")


def assert_same(run: Path, wanted: Path) -> None:
    assert learned(run) == learned(wanted)
    assert measured(run) == measured(wanted)
    assert len(list((run / "checkpoints").iterdir())) == len(list((wanted / "checkpoints").iterdir()))


def rows_written(count: int):
    def happened(out: Path) -> bool:
        path = out / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    return happened


def checkpoint_in_the_making(out: Path) -> bool:
    return any((out / "checkpoints").glob("step-*.tmp-*"))


def second_checkpoint_in_the_making(out: Path) -> bool:
    return any((out / "checkpoints").glob("step-000004.tmp-*"))


MOMENTS = {
    "as_soon_as_it_is_there": lambda out: out.exists(),
    "after_1_row": rows_written(1),
    "after_3_rows": rows_written(3),
    "after_6_rows": rows_written(6),
    "in_the_first_checkpoint": checkpoint_in_the_making,
    "in_the_second_checkpoint": second_checkpoint_in_the_making,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_and_ends_bit_for_bit_where_it_would_have(
    tercet, command, undisturbed, tmp_path: Path, stage, moment
):
    out = tmp_path / "run"
    assert stopped(tercet, command[stage], out, MOMENTS[moment]).code == -signal.SIGKILL
    tercet(*command[stage], "--out", out)
    assert_same(out, undisturbed[stage])


def test_a_run_killed_again_and_again_ends_where_it_would_have(tercet, command, undisturbed, tmp_path: Path):
    out = tmp_path / "run"
    for count in (2, 4, 5, 6):
        tercet.start(*command["rl"], "--out", out).stop_when(
            lambda count=count: rows_written(count)(out), signal.SIGKILL
        )
    tercet(*command["rl"], "--out", out)
    assert_same(out, undisturbed["rl"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_whole_run_killed_in_any_stage_ends_where_it_would_have(tercet, small, finished: Path, tmp_path: Path, stage):
    root = tmp_path / "run"
    words = ("rlhf", *small, "--out", root)
    tercet.start(*words).stop_when(lambda: rows_written(2)(root / stage), signal.SIGKILL)
    assert not (root / "evaluation.json").exists()
    tercet(*words)
    for name in ("sft", "preference", "judge", "rl"):
        assert_same(root / name, finished / name)
    assert (root / "evaluation.json").read_bytes() == (finished / "evaluation.json").read_bytes()


def test_a_run_in_bfloat16_killed_and_gone_on_with_ends_where_it_would_have(tercet, small, tmp_path: Path):
    words = ("rlhf", *small, "--dtype", "bfloat16", "--out")
    tercet(*words, tmp_path / "straight")
    tercet.start(*words, tmp_path / "killed").stop_when(
        lambda: rows_written(2)(tmp_path / "killed" / "rl"), signal.SIGKILL
    )
    tercet(*words, tmp_path / "killed")
    for name in ("sft", "preference", "judge", "rl"):
        assert_same(tmp_path / "killed" / name, tmp_path / "straight" / name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_says_how_to_go_on_and_does(tercet, command, undisturbed, tmp_path: Path, number):
    out = tmp_path / "run"
    ended = stopped(tercet, command["rl"], out, rows_written(1), number)
    assert ended.code == 130
    assert "saving after this step, then stopping" in ended.err
    assert f"of {STEPS}; saved in {out / 'checkpoints'}" in ended.err and "type the same command to go on" in ended.err
    assert "Traceback" not in ended.err
    [newest] = sorted((out / "checkpoints").glob("step-*"))[-1:]
    assert len([row for row in measured(out) if "prompt" not in row]) == int(newest.name[-6:])
    tercet(*command["rl"], "--out", out)
    assert learned(out) == learned(undisturbed["rl"]) and measured(out) == measured(undisturbed["rl"])


def test_ctrl_c_outside_of_the_steps_ends_it_too(tercet, finished: Path, tmp_path: Path):
    out = tmp_path / "answers.jsonl"
    started = tercet.start("generate", "--policy", finished / "rl", "--max-tokens", 20, "--out", out)
    ended = started.stop_when(lambda: out.with_name("answers.jsonl.part").exists(), signal.SIGINT)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert not out.exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tercet, command, undisturbed, tmp_path: Path):
    out = tmp_path / "run"
    stopped(tercet, command["sft"], out, lambda out: (out / "checkpoints/step-000004").exists())
    newest = sorted((out / "checkpoints").glob("step-??????"))[-1]
    weights = newest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    ended = tercet(*command["sft"], "--out", out)
    assert f"checkpoint {newest} is damaged (adapter_model.safetensors does not have the sha256" in ended.err
    assert learned(out) == learned(undisturbed["sft"]) and measured(out) == measured(undisturbed["sft"])


def test_a_finished_run_with_damaged_weights_is_mended(tercet, command, undisturbed, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed["sft"], out)
    (out / "checkpoints" / f"step-{STEPS:06d}" / "adapter_model.safetensors").write_bytes(b"")
    tercet(*command["sft"], "--out", out)
    assert learned(out) == learned(undisturbed["sft"]) and measured(out) == measured(undisturbed["sft"])


def test_two_commands_cannot_work_in_one_folder(tercet, command, tmp_path: Path):
    out = tmp_path / "run"
    first = tercet.start(*command["sft"], "--out", out)
    while not rows_written(1)(out):
        assert first.is_running()
    assert f"in use by process {first.pid}" in tercet(*command["sft"], "--out", out, code=2).err
    assert first.wait().code == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tercet, command, tmp_path: Path, stage):
    out = tmp_path / "run"
    words = (*command[stage], "--learning-rate", 1e30, "--max-grad-norm", "none", "--out", out)
    failed = tercet(*words, code=1).err
    assert "Traceback" not in failed and "tercet: " in failed
    kept = json.loads((out / "failed-batch.json").read_text())
    assert kept["data"] and all(len(row["tokens"]) == len(row["weights"]) for row in kept["data"])
    assert str(out / "failed-batch.json") in failed
    assert not (out / "done.json").exists()


def test_a_run_that_failed_can_be_looked_at(tercet, command, tmp_path: Path):
    out = tmp_path / "run"
    tercet(*command["sft"], "--learning-rate", 1e30, "--max-grad-norm", "none", "--out", out, code=1)
    before = written(out)
    tercet("report", out)
    assert set(written(out)) - set(before) == {"report.html"}
