"""One run, one folder: metrics, samples, checkpoints, and going on where it stood."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from tercet.errors import ConfigError, UsageError
from tercet.runs import checkpoints, settings
from tercet.runs.durable import remove_unfinished, sync
from tercet.runs.environment import environment
from tercet.runs.interruption import Interrupted, Interruption
from tercet.runs.lock import lock
from tercet.runs.loggers import Logger, make_loggers
from tercet.runs.progress import ProgressDisplay
from tercet.runs.rows import append_rows, cut_rows, read_rows, steps_written
from tercet.types import Weights


@dataclass(frozen=True)
class Start:
    """Where a run stands: the step to do next, and, when it goes on, the weights to load and what the loop saved."""

    step: int
    weights: Weights | None
    state: dict[str, Any]


class Run:
    """A folder that one process at a time works in.

    Killed at any moment and started again with the same config, a run goes on from its newest intact checkpoint, and no
    row of its metrics is lost or doubled. Used with `with`, the first Ctrl-C makes the next `save_is_due` true and that
    `save` raise `Interrupted`; a second one ends the process at once.

    Args:
        directory: The folder; made when it is not there.
        config: What the run is done with; kept in `config.yaml` and compared when the run goes on.
        save_every_steps: Steps between checkpoints; 0 saves only at the end.
        total_steps: Steps of the whole run.
        stage: What is done: sft, preference, judge, rl, or any other word.
        loggers: Where metrics go besides `metrics.jsonl`; None is TensorBoard alone.
        keep: Checkpoints kept; older ones are deleted.
        shown: Metric key to label, for the numbers shown live; None is `SHOWN[stage]`.
        may_differ: Dotted names of config fields that may change when the run goes on.

    Raises:
        ConfigError: The folder holds a run with another config (names the fields), or a setting is out of range.
        UsageError: Another process works in the folder.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: Mapping[str, object],
        save_every_steps: int,
        total_steps: int,
        stage: str,
        loggers: Sequence[Logger] | None = None,
        keep: int = 2,
        shown: Mapping[str, str] | None = None,
        may_differ: Set[str] = frozenset(),
    ) -> None:
        for name, value, least in (
            ("save_every_steps", save_every_steps, 0), ("total_steps", total_steps, 0), ("keep", keep, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        self.directory = Path(directory)
        self.total_steps = total_steps
        self.stage = stage
        self._config = config
        self._save_every_steps = save_every_steps
        self._loggers = make_loggers() if loggers is None else loggers
        self._keep = keep
        self._shown = shown
        self._interruption = Interruption()
        self._progress: ProgressDisplay | None = None
        self._logged_steps: int | None = None
        self._is_done: bool | None = None
        self._elapsed_before_s = 0.0
        self._opened_at = time.monotonic()
        self._checkpoints = self.directory / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        # A run that is dropped without `close` must not keep its folder.
        self._unlock = weakref.finalize(self, os.close, lock(self.directory))
        try:
            self._check_config(may_differ)
        except BaseException:
            self.close()
            raise

    def start(self) -> Start:
        """Put the folder in order and say where the run stands.

        The newest intact checkpoint is taken; a damaged one is named in a warning and the one before it used. Rows of
        steps that will be done again are cut, as is a line torn by a kill; what was left half written is removed.
        A finished run is left as it is, and stands at its end.
        """
        remove_unfinished(self.directory)
        newest = checkpoints.newest_intact(self._checkpoints)
        checkpoints.clean(self._checkpoints, newest=newest)
        checkpoints.prune(self._checkpoints, keep=self._keep)
        done = self.is_done
        if not done:
            (self.directory / "done.json").unlink(missing_ok=True)
        checkpoints.write_index(self.directory)
        record: dict[str, Any] = {"next_step": 0, "elapsed_s": 0.0, "state": {}} if newest is None else newest.record()
        step: int = record["next_step"]
        self._elapsed_before_s = record["elapsed_s"]
        self._logged_steps = step
        if not done:
            logged_steps = self._record_start(step)
            cut_rows(self._samples, step=step)
            cut_rows(self._metrics, step=step)
            for each in self._loggers:
                each.begin(self.directory, self._config, stage=self.stage, step=step, logged_steps=logged_steps)
            self._progress = ProgressDisplay(
                self.stage, total_steps=self.total_steps, first_step=step, shown=self._shown
            )
        return Start(step, None if newest is None else Weights(newest.directory), record["state"])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write down what was measured at `step`: one row, once.

        A number that is not finite becomes null in `metrics.jsonl`, which stays valid JSON.

        Raises:
            UsageError: `start` was not called, or the step was logged before.
        """
        if self._logged_steps is None:
            raise UsageError("run.log was called before run.start, which says where the run stands; call that first")
        if self.is_done:
            raise UsageError(f"the run in {self.directory} is finished; see run.is_done before logging step {step}")
        if step < self._logged_steps:
            raise UsageError(f"step {step} was logged before; log each step once, with all its metrics")
        row = {key: value if isinstance(value, int) else float(value) for key, value in metrics.items()}
        append_rows(self._metrics, [{"step": step, **row}])
        self._logged_steps = step + 1
        for each in self._loggers:
            each.log(step, metrics)
        if self._progress is not None:
            self._progress.update(step, metrics)

    def samples(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Write down what was sampled at `step`: one row per sample, the step put first."""
        append_rows(self._samples, [{"step": step, **row} for row in rows])

    def save_is_due(self, next_step: int) -> bool:
        """Whether to save now that all steps below `next_step` are done: by cadence, at the end, or after Ctrl-C."""
        if self.interrupted or next_step == self.total_steps:
            return True
        return self._save_every_steps > 0 and next_step % self._save_every_steps == 0

    def save(self, trainer: checkpoints.Saves, *, next_step: int, state: Mapping[str, object] | None = None) -> Weights:
        """Write a checkpoint: all that is needed to go on with `next_step`.

        Args:
            trainer: Saves weights, optimizer and generators.
            next_step: The first step that the saved weights have not learned.
            state: What else must be restored (data cursor, KL coefficient …); given back by `start`.

        Raises:
            Interrupted: Ctrl-C asked for this save; the message says how to go on.
            UsageError: The state would not read back equal from JSON.
        """
        for path in (self._metrics, self._samples):
            if path.exists():
                sync(path)
        for each in self._loggers:
            each.flush()
        target = self._checkpoints / f"step-{next_step:06d}"
        # One that is there already was verified by `start` or written by this process, and says the same.
        if not target.exists():
            checkpoints.write_checkpoint(
                self._checkpoints, trainer, step=next_step, elapsed_s=self.elapsed_s, state=state or {}
            )
            checkpoints.prune(self._checkpoints, keep=self._keep)
            checkpoints.write_index(self.directory)
        if self.interrupted:
            raise Interrupted(
                f"stopped after step {next_step} of {self.total_steps}; saved in {target}; "
                "type the same command to go on"
            )
        return Weights(target)

    def finish(self, trainer: checkpoints.Saves, *, state: Mapping[str, object] | None = None) -> Weights:
        """Mark the run as done, saving the last step first if that was not done, and close it.

        Returns:
            The final weights.
        """
        weights = self.save(trainer, next_step=self.total_steps, state=state)
        if not self.is_done:
            checkpoints.mark_done(self.directory, checkpoints.Checkpoint(weights.path, self.total_steps))
            checkpoints.write_index(self.directory)
            self._is_done = True
        self.close()
        return weights

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C (or SIGTERM) asked the run to save and stop."""
        return self._interruption.requested

    @property
    def elapsed_s(self) -> float:
        """Seconds this run has taken, in all the processes that worked on it; time lost to a kill is not counted."""
        return self._elapsed_before_s + time.monotonic() - self._opened_at

    @property
    def is_done(self) -> bool:
        """Whether the run has ended and its final weights are intact; verified once."""
        if self._is_done is None:
            done = checkpoints.read_done(self.directory)
            self._is_done = (
                done is not None
                and done["step"] == self.total_steps
                and checkpoints.find_damage(self.directory / str(done["checkpoint"])) is None
            )
        return self._is_done

    @property
    def final_weights(self) -> Weights:
        """The weights the run ended with.

        Raises:
            CheckpointError: The run is not finished, or its final checkpoint is damaged.
        """
        return checkpoints.final_weights(self.directory)

    def close(self) -> None:
        """End display and loggers and give the folder back. Nothing is saved; a closed run can be opened again."""
        if self._progress is not None:
            self._progress.close()
        for each in self._loggers:
            each.close()
        self._interruption.remove()
        self._unlock()

    def __enter__(self) -> Run:
        self._interruption.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def _samples(self) -> Path:
        return self.directory / "samples.jsonl"

    def _check_config(self, may_differ: Set[str]) -> None:
        path = self.directory / "config.yaml"
        if not path.exists() and (self._metrics.exists() or checkpoints.list_checkpoints(self._checkpoints)):
            raise ConfigError(
                f"{self.directory} has a run without its config.yaml, so nobody can tell whether this is the same run; "
                "put the file back or choose another --out"
            )
        settings.keep_config(path, self._config, may_differ=may_differ)

    def _record_start(self, step: int) -> int:
        """Note in `starts.jsonl` that a process began, before rows are cut; say how many steps were logged ever."""
        path = self.directory / "starts.jsonl"
        cut_rows(path, step=sys.maxsize)
        before = [row["logged_steps"] for row in read_rows(path)]
        logged_steps: int = max([*before, steps_written(self._metrics)])
        row = {
            "stage": self.stage,
            "step": step,
            "logged_steps": logged_steps,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
        }
        append_rows(path, [row])
        return logged_steps
