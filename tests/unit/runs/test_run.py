"""One run, one folder: config, damage, lock, Ctrl-C, rows."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_trainer import TOTAL_STEPS, WalkingTrainer, child_environment, open_run, train

from tercet.errors import CheckpointError, ConfigError, UsageError
from tercet.runs import Interrupted, Run, final_weights, read_rows


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: object
) -> None:
    train(open_run(tmp_path), until=5)
    newest = tmp_path / "checkpoints" / "step-000004"
    damage(newest / name)  # type: ignore[operator]
    with open_run(tmp_path) as run, caplog.at_level(logging.WARNING):
        start = run.start()
    assert str(newest) in caplog.text and name in caplog.text
    assert start.step == 2
    assert start.weights is not None and start.weights.path == tmp_path / "checkpoints" / "step-000002"
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_run_whose_only_checkpoint_is_damaged_starts_anew_and_ends_the_same(tmp_path: Path) -> None:
    train(open_run(tmp_path / "whole"))
    train(open_run(tmp_path / "hurt"), until=3)
    flip_a_byte(tmp_path / "hurt" / "checkpoints" / "step-000002" / "model.safetensors")
    train(open_run(tmp_path / "hurt"))
    for name in ("metrics.jsonl", "samples.jsonl", "checkpoints/step-000007/model.safetensors"):
        assert (tmp_path / "hurt" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_whose_final_checkpoint_is_damaged_is_not_done_and_goes_on(tmp_path: Path) -> None:
    train(open_run(tmp_path))
    final = tmp_path / "checkpoints" / "step-000007" / "model.safetensors"
    whole = final.read_bytes()
    flip_a_byte(final)
    with pytest.raises(CheckpointError, match=r"step-000007 is damaged \(model\.safetensors"):
        final_weights(tmp_path)
    run = open_run(tmp_path)
    assert not run.is_done
    train(run)
    assert final.read_bytes() == whole
    assert final_weights(tmp_path).path == tmp_path / "checkpoints" / "step-000007"


def test_the_final_weights_of_a_run_under_way_are_refused(tmp_path: Path) -> None:
    train(open_run(tmp_path), until=5)
    with pytest.raises(CheckpointError, match="is not finished"):
        final_weights(tmp_path)


def test_a_changed_config_is_refused_naming_field_both_values_and_what_to_do(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(ConfigError) as refused:
        open_run(tmp_path, config={"seed": 0, "lora": {"rank": 32}, "judge": "hard"})
    message = str(refused.value)
    assert "lora.rank: 16 there, 32 now" in message
    assert "judge: (not set) there, 'hard' now" in message
    assert "seed" not in message
    assert "--out" in message and "put them back" in message
    open_run(tmp_path).close()


def test_a_field_that_may_differ_is_written_anew_with_all_below_it(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    open_run(tmp_path, config={"seed": 0, "lora": {"rank": 32}}, may_differ={"lora"}).close()
    assert "rank: 32" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"lora\.rank: 32 there, 16 now"):
        open_run(tmp_path)


def test_a_config_of_tuples_paths_and_small_numbers_reads_back_as_the_same(tmp_path: Path) -> None:
    config = {"targets": ("q", "v"), "data": Path("some/file.jsonl"), "learning_rate": 1e-5, "max_grad_norm": None}
    open_run(tmp_path, config=config).close()
    open_run(tmp_path, config=config).close()
    with pytest.raises(ConfigError, match="True there, 1 now"):
        open_run(tmp_path / "other", config={"shuffle": True}).close()
        open_run(tmp_path / "other", config={"shuffle": 1})


def test_rows_without_a_config_are_not_taken_for_a_new_run(tmp_path: Path) -> None:
    train(open_run(tmp_path), until=3)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"without its config\.yaml"):
        open_run(tmp_path)


def test_two_processes_never_share_a_folder_and_the_error_names_the_first(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from small_trainer import open_run; "
        "run = open_run(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=child_environment()
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(UsageError, match=f"in use by process {other.pid}"):
            open_run(tmp_path)
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    assert (tmp_path / "run.lock").read_text() == f"{other.pid}\n"
    open_run(tmp_path).close()


def test_a_second_run_object_in_the_same_process_is_refused_until_the_first_is_closed_or_gone(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        open_run(tmp_path)
    run.close()
    run = open_run(tmp_path)
    del run
    open_run(tmp_path).close()


def test_ctrl_c_saves_the_step_says_how_to_go_on_and_the_resumed_run_ends_the_same(tmp_path: Path) -> None:
    train(open_run(tmp_path / "whole"))

    class StoppedTrainer(WalkingTrainer):
        def step(self) -> float:
            os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped, open_run(tmp_path / "stopped") as run:
        trainer = StoppedTrainer()
        start = run.start()
        loss = trainer.step()
        assert run.interrupted
        run.samples(0, [{"group": 0, "index": index, "completion": "Olé 0"} for index in range(2)])
        run.log(start.step, {"loss": loss, "total": loss})
        assert run.save_is_due(1)
        run.save(trainer, next_step=1, state={"total": loss})
    assert "step 1 of 7" in str(stopped.value) and "same command" in str(stopped.value)
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    train(open_run(tmp_path / "stopped"))
    for name in ("metrics.jsonl", "samples.jsonl", "checkpoints/step-000007/model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom small_trainer import open_run\n"
        "with open_run(Path(sys.argv[1])) as run:\n"
        "    print('open', flush=True)\n"
        "    while True:\n        time.sleep(0.01)\n"
        "        if run.interrupted: print('heard', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"heard\n"
        process.send_signal(number)
        assert process.wait(timeout=10) == -number


def test_numbers_that_are_not_finite_are_null_so_that_the_file_stays_valid_json(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.start()
        run.log(0, {"loss": math.nan, "kl": math.inf, "num_tokens": 12, "reward": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 0, "loss": None, "kl": None, "num_tokens": 12, "reward": 0.5}


def test_samples_keep_their_text_whatever_is_in_it(tmp_path: Path) -> None:
    texts = ["Grüße\n\u2028zwei", "\ud800 lone surrogate", '"quoted" </script>']
    with open_run(tmp_path) as run:
        run.start()
        run.samples(0, [{"completion": text, "reward": math.nan} for text in texts])
    assert [row["completion"] for row in read_rows(tmp_path / "samples.jsonl")] == texts


def test_a_step_is_logged_once_and_only_after_start(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(UsageError, match=r"before run\.start"):
            run.log(0, {"loss": 1.0})
        run.start()
        run.log(0, {"loss": 1.0})
        with pytest.raises(UsageError, match="step 0 was logged before"):
            run.log(0, {"loss": 1.0})


def test_saves_are_due_by_cadence_and_at_the_end(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert [step for step in range(1, TOTAL_STEPS + 1) if run.save_is_due(step)] == [2, 4, 6, 7]
    with Run(tmp_path / "b", config={}, save_every_steps=0, total_steps=3, stage="sft", loggers=()) as run:
        assert [step for step in range(1, 4) if run.save_is_due(step)] == [3]


def test_a_state_that_json_would_change_is_refused_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.start()
        with pytest.raises(UsageError, match="lists instead of tuples"):
            run.save(WalkingTrainer(), next_step=1, state={"cursor": (1, 2)})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_trainer_leaves_when_it_fails_in_mid_save_is_removed(tmp_path: Path) -> None:
    class FullDisk(WalkingTrainer):
        def save(self, directory: Path) -> object:  # type: ignore[override]
            super().save(directory)
            raise OSError(28, "No space left on device")

    with open_run(tmp_path) as run:
        run.start()
        with pytest.raises(OSError, match="No space"):
            run.save(FullDisk(), next_step=1)  # type: ignore[arg-type]
        run.save(WalkingTrainer(), next_step=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_finish_saves_the_last_step_when_the_loop_did_not(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.start()
        weights = run.finish(WalkingTrainer(), state={"beta": 0.1})
        assert run.is_done and run.final_weights == weights
    assert json.loads((tmp_path / "done.json").read_text())["checkpoint"] == "checkpoints/step-000007"


def test_a_finished_run_that_is_made_longer_goes_on_from_its_end(tmp_path: Path) -> None:
    train(open_run(tmp_path))
    run = Run(
        tmp_path, config={"seed": 0, "lora": {"rank": 16}}, save_every_steps=2, total_steps=9, stage="rl", loggers=()
    )
    with run:
        assert not run.is_done
        assert run.start().step == TOTAL_STEPS


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    train(open_run(tmp_path / "here"), until=5)
    shutil.move(tmp_path / "here", tmp_path / "there")
    train(open_run(tmp_path / "there"))
    assert final_weights(tmp_path / "there").path.is_relative_to(tmp_path / "there")


def test_elapsed_time_adds_up_over_processes(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.start()
        time.sleep(0.05)
        run.save(WalkingTrainer(), next_step=2)
    with open_run(tmp_path) as run:
        run.start()
        assert run.elapsed_s >= 0.05


@pytest.mark.parametrize(("name", "value"), [("keep", 0), ("total_steps", -1), ("save_every_steps", -2)])
def test_a_setting_out_of_range_is_named(tmp_path: Path, name: str, value: int) -> None:
    settings = {"config": {}, "save_every_steps": 1, "total_steps": 1, "stage": "sft", "loggers": (), name: value}
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        Run(tmp_path, **settings)  # type: ignore[arg-type]
