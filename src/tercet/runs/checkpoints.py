"""Checkpoints of a run: `checkpoints/step-000040/`, written beside, renamed into place, with a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tercet.errors import CheckpointError, UsageError
from tercet.runs.durable import beside, remove_directory, remove_unfinished, sync, write_atomically
from tercet.runs.rows import encode_row
from tercet.types import Weights

logger = logging.getLogger(__name__)


class Saves(Protocol):
    """What a checkpoint is made of: every engine's trainer can do this."""

    def save(self, directory: Path, /) -> Future[Weights]:
        """Write weights, optimizer and generator state into `directory`, which exists and is empty."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A saved state; `step` is the next one to be done."""

    directory: Path
    step: int

    @property
    def name(self) -> str:
        """`step-000040`."""
        return self.directory.name

    def record(self) -> dict[str, Any]:
        """What was saved beside the weights: next_step, elapsed_s, saved_at, and the loop's own `state`."""
        record: dict[str, Any] = json.loads((self.directory / "state.json").read_text())
        return record


def write_checkpoint(
    directory: Path, trainer: Saves, *, step: int, elapsed_s: float, state: Mapping[str, object]
) -> Checkpoint:
    """Save into `directory/step-…`: whole, or not at all.

    Raises:
        UsageError: The state would not read back equal from JSON.
    """
    target = directory / f"step-{step:06d}"
    temporary = beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        trainer.save(temporary).result()
        record = {
            "next_step": step,
            "elapsed_s": round(elapsed_s, 3),
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": state,
        }
        (temporary / "state.json").write_text(_exact_json(record))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "files": {
                path.relative_to(temporary).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
                for path in files
            }
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (temporary, *temporary.rglob("*")):
            sync(path)
    except BaseException:
        # A full disk is a likely reason to be here: give the space back.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(target)
    sync(directory)
    return Checkpoint(target, step)


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints in `directory`, oldest first; whether they are intact is not looked at."""
    found = [(re.fullmatch(r"step-(\d{6,})", path.name), path) for path in directory.glob("step-*")]
    return sorted((Checkpoint(path, int(match[1])) for match, path in found if match), key=lambda each: each.step)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None when every file is there and has its hash."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((directory / "manifest.json").read_text())["files"]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json cannot be read"
    if "state.json" not in files:
        return "manifest.json does not list state.json"
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {wanted['size']}"
        if _sha256(path) != wanted["sha256"]:
            return f"{name} does not have the sha256 of its manifest"
    return None


def newest_intact(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; each damaged one above it is named in a warning."""
    for checkpoint in reversed(list_checkpoints(directory)):
        damage = find_damage(checkpoint.directory)
        if damage is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged (%s); going back to the one before it", checkpoint.directory, damage)
    return None


def clean(directory: Path, *, newest: Checkpoint | None) -> None:
    """Remove what killed processes left, and put damaged checkpoints above `newest` aside: their places are needed."""
    remove_unfinished(directory)
    for checkpoint in list_checkpoints(directory):
        if newest is None or checkpoint.step > newest.step:
            aside = directory / f"damaged-{checkpoint.name}"
            if aside.exists():
                remove_directory(aside)
            checkpoint.directory.rename(aside)


def prune(directory: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for checkpoint in list_checkpoints(directory)[:-keep]:
        remove_directory(checkpoint.directory)


def write_index(run: Path) -> None:
    """Write `checkpoints.jsonl` from the folders that are there: a row each, and one named `final` when it is done.

    The folders are the truth and the file is made from them each time, so that a crash between the two heals itself.
    """
    checkpoints = list_checkpoints(run / "checkpoints")
    rows = [_index_row(checkpoint.name, checkpoint) for checkpoint in checkpoints]
    done = read_done(run)
    rows += [_index_row("final", each) for each in checkpoints if done and each.step == done["step"]]
    write_atomically(run / "checkpoints.jsonl", b"".join(encode_row(row) for row in rows))


def mark_done(run: Path, checkpoint: Checkpoint) -> None:
    """Say in `done.json` that the run ended, and with which checkpoint."""
    elapsed_s = checkpoint.record()["elapsed_s"]
    done = {"step": checkpoint.step, "checkpoint": f"checkpoints/{checkpoint.name}", "elapsed_s": elapsed_s}
    write_atomically(run / "done.json", json.dumps(done, indent=1) + "\n")


def read_done(run: Path) -> dict[str, Any] | None:
    """The step and checkpoint a run ended with; None when it has not ended."""
    path = run / "done.json"
    if not path.exists():
        return None
    done: dict[str, Any] = json.loads(path.read_text())
    return done


def final_weights(run: Path) -> Weights:
    """The weights a finished run ended with. Reads only: the run need not be opened, or free.

    Raises:
        CheckpointError: The run is not finished, or its final checkpoint is damaged.
    """
    done = read_done(run)
    if done is None:
        raise CheckpointError(f"the run in {run} is not finished; type the command that made it again, and it goes on")
    directory = run / str(done["checkpoint"])
    damage = find_damage(directory)
    if damage is not None:
        raise CheckpointError(
            f"checkpoint {directory} is damaged ({damage}); type the command that made the run again, "
            "and it goes on from the checkpoint before it"
        )
    return Weights(directory)


def _index_row(name: str, checkpoint: Checkpoint) -> dict[str, object]:
    path = f"checkpoints/{checkpoint.name}"
    return {"name": name, "step": checkpoint.step, "path": path, "saved_at": checkpoint.record()["saved_at"]}


def _exact_json(record: Mapping[str, object]) -> str:
    text = json.dumps(record, indent=1)
    if json.loads(text) != record:
        raise UsageError(
            f"the state of a checkpoint must read back equal from JSON, and {record['state']!r} does not: "
            "use lists instead of tuples, strings as keys, and finite numbers"
        )
    return text


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
