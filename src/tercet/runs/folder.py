"""A finished or running folder read back for its report: one stage, or a whole pipeline of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tercet.errors import DataError, UsageError
from tercet.runs.checkpoints import list_checkpoints, read_done
from tercet.runs.rows import Row, read_rows

STAGES = ("sft", "preference", "judge", "rl")
"""The stages of a pipeline, in the order they are done; each is a folder of that name."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage as its folder tells it."""

    name: str
    directory: Path
    metrics: list[Row]
    samples: list[Row]
    starts: list[Row]
    config: str
    steps: int
    """Steps that were done; a row of metrics after the last one, measured at the end, is none."""
    is_done: bool
    elapsed_s: float | None
    """Seconds up to the last checkpoint; None when there is none."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was measured; null, which stands for not finite, is NaN."""
        rows = [row for row in self.metrics if key in row]
        return [row["step"] for row in rows], [math.nan if row[key] is None else float(row[key]) for row in rows]

    def first(self, key: str) -> float | None:
        """The first finite value of a metric; None when there is none."""
        return next((value for value in self.series(key)[1] if math.isfinite(value)), None)

    def last(self, key: str) -> float | None:
        """The last finite value of a metric; None when there is none."""
        return next((value for value in reversed(self.series(key)[1]) if math.isfinite(value)), None)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What a report is made from."""

    root: Path
    stages: dict[str, Stage]
    config: str
    """The config of the whole pipeline; empty for a single stage."""
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """The model's name, where the config has one."""
        for text in (self.config, *(stage.config for stage in self.stages.values())):
            config = yaml.safe_load(text) if text else None
            groups = [config, config.get("setup")] if isinstance(config, Mapping) else []
            name = next((group["model"] for group in groups if isinstance(group, Mapping) and "model" in group), None)
            if isinstance(name, str):
                return name
        return None

    @property
    def environment(self) -> dict[str, Any]:
        """Machine and libraries of the process that began last."""
        starts = [row for stage in self.stages.values() for row in stage.starts]
        facts: dict[str, Any] = max(starts, key=lambda row: str(row["time"]))["environment"] if starts else {}
        return facts

    def win_rate(self, judge: str, *, policy: str = "rl", against: str = "sft") -> dict[str, float] | None:
        """win_rate, low, high and n of one policy against another: as evaluated at the end, else last in training.

        RL by itself calls the policy it began with `start`; it is found under `sft` too.
        """
        names = ("sft", "start") if against == "sft" else (against,)
        for row in self.evaluation.get("win_rates", []):
            if (row["policy"], row["judge"]) == (policy, judge) and row["against"] in names:
                return {key: row[key] for key in ("win_rate", "low", "high", "n") if row.get(key) is not None}
        stage = self.stages.get("rl")
        if stage is None or (policy, against) != ("rl", "sft"):
            return None
        prefix = WIN_RATE_KEYS[judge]
        found = {
            key: stage.last(f"{prefix}{suffix}")
            for key, suffix in (("win_rate", ""), ("low", "_low"), ("high", "_high"))
        }
        return (
            {key: value for key, value in found.items() if value is not None} if found["win_rate"] is not None else None
        )


WIN_RATE_KEYS = {"preference": "test/win_rate", "held_out": "test/held_out/win_rate"}
"""Where the metrics of RL hold the win rate under each judge."""


def read_folder(root: Path) -> RunFolder:
    """Read a pipeline's folder or a single stage's; any stage, and the evaluation, may be missing.

    Raises:
        UsageError: There is no run in `root`.
        DataError: The evaluation is not JSON.
    """
    known = [name for name in STAGES if _is_stage(root / name)]
    others = sorted(path.name for path in root.glob("*/") if path.name not in STAGES and _is_stage(path))
    stages = {name: _read_stage(root / name, name) for name in [*known, *others]}
    config = _read_text(root / "config.yaml") if stages else ""
    if not stages and _is_stage(root):
        stage = _read_stage(root, None)
        stages = {stage.name: stage}
    if not stages:
        raise UsageError(
            f"{root} holds no run (no metrics.jsonl, nor a folder with one); give the folder named by --out"
        )
    try:
        evaluation = json.loads(_read_text(root / "evaluation.json") or "{}")
    except ValueError as error:
        raise DataError(
            f"{root / 'evaluation.json'} is not JSON ({error}); delete it, or run the evaluation again"
        ) from error
    return RunFolder(root=root, stages=stages, config=config, evaluation=evaluation)


def _is_stage(directory: Path) -> bool:
    return (directory / "metrics.jsonl").is_file()


def _read_stage(directory: Path, name: str | None) -> Stage:
    metrics = read_rows(directory / "metrics.jsonl")
    starts = read_rows(directory / "starts.jsonl")
    done = read_done(directory)
    checkpoints = list_checkpoints(directory / "checkpoints")
    if done is not None:
        elapsed_s = done["elapsed_s"]
    else:
        elapsed_s = checkpoints[-1].record()["elapsed_s"] if checkpoints else None
    return Stage(
        name=name or (starts[-1]["stage"] if starts else _guess_name(metrics)),
        directory=directory,
        metrics=metrics,
        samples=read_rows(directory / "samples.jsonl"),
        starts=starts,
        config=_read_text(directory / "config.yaml"),
        steps=len({row["step"] for row in metrics}) if done is None else done["step"],
        is_done=done is not None,
        elapsed_s=elapsed_s,
    )


def _guess_name(metrics: list[Row]) -> str:
    keys = {key for row in metrics for key in row}
    if "win_minus_loss" in keys or "reward" in keys:
        return "rl"
    return "preference" if "test/accuracy" in keys or "accuracy" in keys else "sft"


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
