"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_trainer import TOTAL_STEPS, open_run, train

from tercet.errors import ConfigError, UsageError
from tercet.runs import make_loggers
from tercet.runs.loggers import TensorBoard, Tracker


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_each_step_once_after_a_run_was_stopped_and_resumed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for until in (3, 6, TOTAL_STEPS):
        with open_run(tmp_path, loggers=[TensorBoard()]) as run:
            train(run, until=until)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(TOTAL_STEPS))


def test_an_optional_logger_that_is_not_installed_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from pathlib import Path; from tercet.runs import Run, make_loggers\n"
        "run = Run(Path(sys.argv[1]), config={}, save_every_steps=1, total_steps=1, stage='sft',"
        " loggers=make_loggers(['wandb'])[1:])\n"
        "run.start()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "UsageError: wandb was asked for and is not installed" in done.stderr
    assert "pip install 'tercet[wandb]'" in done.stderr


def test_an_unknown_logger_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        make_loggers(["wanbd"])


def test_tensorboard_is_always_there_and_named_once() -> None:
    assert [type(each) for each in make_loggers()] == [TensorBoard]
    assert [type(each) for each in make_loggers(["tensorboard", "trackio"])] == [TensorBoard, Tracker]


def test_a_tracker_is_not_sent_what_it_has_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for a service that needs an account: it records its calls as the service's own library would send them.
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "recording_service.py").write_text(
        "started, points = [], []\n"
        "def init(**settings): started.append(settings)\n"
        "def log(metrics, step): points.append(step)\n"
        "def finish(): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for until in (5, 3, 6, TOTAL_STEPS):
        with open_run(tmp_path / "run", loggers=[Tracker("recording_service")]) as run:
            train(run, until=until)
    service = sys.modules["recording_service"]
    assert service.points == list(range(TOTAL_STEPS))
    assert len({settings["name"] for settings in service.started}) == 1


def test_a_missing_service_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no_such_service was asked for"):
        Tracker("no_such_service").begin(tmp_path, {}, stage="sft", step=0, logged_steps=0)
