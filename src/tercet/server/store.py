"""Checkpoints and training runs on disk: they outlive sessions and the server.

::

    ROOT/run.lock                                    of the server that has the folder
    ROOT/sess-…:train:0/run.json                     what the run is
    ROOT/sess-…:train:0/weights/000010/              adapter, optimizer, checkpoint.json; tinker://…/weights/000010
    ROOT/sess-…:train:0/sampler_weights/000010/      the same, to sample from
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

from tercet.errors import CheckpointError, UsageError
from tercet.runs.durable import UNFINISHED, remove_directory, remove_unfinished, sync, write_atomically

LOG = logging.getLogger("tercet.server")
SCHEME = "tinker://"
KINDS = {"weights": "training", "sampler_weights": "sampler"}
RUN_FILE, CHECKPOINT_FILE = "run.json", "checkpoint.json"
Found = TypeVar("Found")
# A file's path and what is in it -> what that means.
Reader = Callable[[Path, dict[str, Any]], Found]
Notes = Callable[[Path, Reader[dict[str, Any]]], dict[str, Any] | None]
# A checkpoint that is being replaced stands under this name until the new one is in its place.
ASIDE = f"{UNFINISHED}old"
# Ten years, as on the hosted service.
LONGEST_S = 315_360_000
# One name, no path: nothing that leads out of the folder, and nothing hidden.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+=@-]{0,199}")


@dataclass(frozen=True)
class Run:
    """A training run, which is one trained model."""

    training_run_id: str
    base_model: str
    """The name that the client asked for."""
    served: str
    """The model behind that name: weights of one do not fit another."""
    lora_rank: int | None
    user_metadata: dict[str, Any] | None
    created: str
    last_request_time: str


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights."""

    run: Run
    kind: str
    name: str
    directory: Path
    time: str
    size_bytes: int
    user_metadata: dict[str, Any] | None
    expires_at: str | None
    lora_rank: int | None = None
    """The run may have gone on from weights of another one since."""

    @property
    def path(self) -> str:
        """As clients name it."""
        return f"{SCHEME}{self.run.training_run_id}/{self.kind}/{self.name}"

    def as_json(self) -> dict[str, Any]:
        """As the SDK reads it."""
        return {
            "checkpoint_id": f"{self.kind}/{self.name}",
            "checkpoint_type": KINDS[self.kind],
            "time": self.time,
            "tinker_path": self.path,
            "size_bytes": self.size_bytes,
            "public": False,
            "user_metadata": in_words(self.user_metadata),
            "expires_at": self.expires_at,
        }


def in_words(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """A client's metadata as the SDK reads them: it takes anything to be sent, and only texts to come back.

    >>> in_words({"who": "me", "step": 3, "tags": ["a"]})
    {'who': 'me', 'step': '3', 'tags': '["a"]'}
    """
    if metadata is None:
        return None
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    # Of what was kept before such were refused: half of a character cannot be told.
    return {
        name.encode(errors="replace").decode(): text.encode(errors="replace").decode() for name, text in texts.items()
    }


def now() -> str:
    """The time, as the SDK reads it."""
    return datetime.now(UTC).isoformat()


def checked_name(name: str, what: str = "checkpoint") -> str:
    """The name itself, once it can name one folder.

    Raises:
        UsageError: It cannot.
    """
    if not NAME.fullmatch(name) or UNFINISHED in name:
        raise UsageError(
            f"{name!r} cannot name a {what}: letters, digits and . _ - : + = @ are allowed, at most 200 of them, "
            "and a letter, digit or _ comes first"
        )
    return name


class Store:
    """The folder of all runs, of one server at a time; several of its threads may use it at once."""

    def __init__(self, root: Path) -> None:
        """Open it; what a killed server left half written is removed, what it was replacing is put back."""
        self.root = root
        self._changing = threading.Lock()
        self._told: set[Path] = set()
        root.mkdir(parents=True, exist_ok=True)
        for run in root.iterdir():
            for kind in KINDS:
                if (run / kind).is_dir():
                    _put_back(run / kind)
                    remove_unfinished(run / kind)

    def begin(self, run: Run) -> None:
        """Keep a new run, or what is new about one."""
        folder = self.root / checked_name(run.training_run_id, "training run")
        folder.mkdir(exist_ok=True)
        with self._changing:
            write_atomically(folder / RUN_FILE, json.dumps(asdict(run), indent=1))

    def touch(self, run_id: str, at: str) -> None:
        """Note when the run was last asked for something."""
        run = self.run(run_id)
        if run is not None:
            self.begin(replace(run, last_request_time=at))

    def run(self, run_id: str) -> Run | None:
        """The run of this id.

        Raises:
            CheckpointError: Its file is damaged.
        """
        return _record(self.root / checked_name(run_id, "training run") / RUN_FILE, _run)

    def runs(self) -> list[Run]:
        """Every run, the newest first, but for those whose files are damaged."""
        paths = self.root.glob(f"*/{RUN_FILE}")
        runs = [run for path in paths if (run := self._if_whole(path, _run)) is not None]
        return sorted(runs, key=lambda run: run.created, reverse=True)

    def save(
        self,
        run_id: str,
        kind: str,
        name: str,
        write: Callable[[Path], None],
        *,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, Any] | None,
        overwrite: bool,
        lora_rank: int | None = None,
    ) -> Checkpoint:
        """Write a checkpoint; a reader sees all of it or nothing.

        Args:
            run_id: The run.
            kind: A key of `KINDS`.
            name: Of the checkpoint, within its run and kind.
            write: Writes the weights into a folder.
            ttl_seconds: When it expires; None never.
            user_metadata: Kept with it.
            overwrite: Whether it may replace one of the same name.
            lora_rank: Of the weights.

        Raises:
            UsageError: The name cannot name a folder, or is taken; there is no such run; or the time is out of range.
        """
        _expiry(ttl_seconds)  # refused before anything is written
        run = self.run(run_id)
        if run is None:
            raise UsageError(f"there is no training run {run_id} to save a checkpoint of")
        final = self.root / run_id / kind / checked_name(name)
        if final.exists() and not overwrite:
            raise UsageError(f"{SCHEME}{run_id}/{kind}/{name} is there already; give another name, or overwrite=True")
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{name}{UNFINISHED}new")
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        try:
            write(temporary)
            note: dict[str, Any] = {
                "time": now(),
                "size_bytes": sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()),
                "user_metadata": None if user_metadata is None else dict(user_metadata),
                "expires_at": _expiry(ttl_seconds),
                "lora_rank": lora_rank,
            }
            (temporary / CHECKPOINT_FILE).write_text(json.dumps(note))
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            with self._changing:
                _replace(final, temporary)
        except BaseException:
            # A full disk, mostly: half of a checkpoint would keep it full.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Checkpoint(run, kind, name, final, **note)

    def checkpoint(self, path: str) -> Checkpoint:
        """The checkpoint that a client names.

        Raises:
            UsageError: The name is none.
            CheckpointError: There is no such checkpoint, or not any more; or its files are damaged.
        """
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
            raise UsageError(
                f"{path!r} names no checkpoint here: {SCHEME}<training run>/<{' or '.join(KINDS)}>/<name> is wanted"
            )
        run_id, kind, name = parts
        run = self.run(run_id)
        found = None if run is None else self._read(run, kind, checked_name(name))
        if found is None:
            raise CheckpointError(
                f"there is no checkpoint {path}; this server keeps those that were saved to it in {self.root} and "
                "have not expired"
            )
        return found

    def checkpoints(self, run_id: str | None = None) -> list[Checkpoint]:
        """Those of one run, or all; the newest first, but for those whose files are damaged.

        Raises:
            CheckpointError: The file of the one run is damaged.
        """
        runs = self.runs() if run_id is None else [run for run in [self.run(run_id)] if run is not None]
        found = [
            each
            for run in runs
            for kind in KINDS
            for path in _finished(self.root / run.training_run_id / kind, f"*/{CHECKPOINT_FILE}")
            if (each := self._read(run, kind, path.parent.name, self._if_whole)) is not None
        ]
        return sorted(found, key=lambda each: each.time, reverse=True)

    def delete(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint.

        Raises:
            CheckpointError: Somebody else has.
        """
        with self._changing:
            self._note(checkpoint)
            remove_directory(checkpoint.directory)

    def expire_in(self, checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
        """Say anew when it expires; None never.

        Raises:
            CheckpointError: It has been removed.
            UsageError: The time is out of range.
        """
        until = _expiry(ttl_seconds)
        with self._changing:
            note = {**self._note(checkpoint), "expires_at": until}
            write_atomically(checkpoint.directory / CHECKPOINT_FILE, json.dumps(note))

    def tidy(self) -> None:
        """Remove what has expired."""
        for path in _finished(self.root, f"*/*/*/{CHECKPOINT_FILE}"):
            with self._changing:
                note = self._if_whole(path, _note)
                if note is not None and _expired(note["expires_at"]):
                    remove_directory(path.parent)

    def archive(self, checkpoint: Checkpoint) -> Iterator[bytes]:
        """The checkpoint's files as a tar, piece by piece."""
        with tempfile.TemporaryFile() as file:
            _pack(checkpoint, file)
            file.seek(0)
            while piece := file.read(1 << 20):
                yield piece

    def _read(self, run: Run, kind: str, name: str, record: Notes | None = None) -> Checkpoint | None:
        directory = self.root / run.training_run_id / kind / name
        with self._changing:
            note = (record or _record)(directory / CHECKPOINT_FILE, _note)
        if note is None or _expired(note["expires_at"]):
            return None
        return Checkpoint(run, kind, name, directory, **{"lora_rank": run.lora_rank, **note})

    def _note(self, checkpoint: Checkpoint) -> dict[str, Any]:
        note = _record(checkpoint.directory / CHECKPOINT_FILE, _note)
        if note is None:
            raise CheckpointError(f"the checkpoint {checkpoint.path} has just been removed")
        return note

    def _if_whole(self, path: Path, read: Reader[Found]) -> Found | None:
        """What a file holds, unless it is damaged, which the log then says once."""
        try:
            return _record(path, read)
        except CheckpointError as error:
            if path not in self._told:
                LOG.warning("left out of lists, and never expires: %s", error)
            self._told.add(path)
            return None


def _record(path: Path, read: Reader[Found]) -> Found | None:
    """What a file holds, unless it is not there: another thread may have removed it since it was listed.

    Raises:
        CheckpointError: It holds something else.
    """
    try:
        return read(path, json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); put it right, or remove the folder it is in"
        ) from error


def _run(path: Path, found: dict[str, Any]) -> Run:
    run = Run(**found)
    _check(run.training_run_id == path.parent.name, f"it is of the run {run.training_run_id!r}")
    texts = (run.base_model, run.served, run.created, run.last_request_time)
    _check(all(isinstance(each, str) for each in texts), "a name or time is no text")
    _check_metadata(run.user_metadata)
    return run


def _note(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    _check(isinstance(found["time"], str), "its time is no text")
    _check(isinstance(found["size_bytes"], int), "its size is no number")
    _check_metadata(found["user_metadata"])
    _expired(found["expires_at"])
    more = set(found) - {each.name for each in fields(Checkpoint)}
    _check(not more, f"it has {', '.join(sorted(more))}, which means nothing here")
    return found


def _check_metadata(found: object) -> None:
    _check(found is None or isinstance(found, dict), "its user_metadata are no table")


def _check(right: bool, wrong: str) -> None:
    if not right:
        raise ValueError(wrong)


def _finished(folder: Path, pattern: str) -> list[Path]:
    """The files of checkpoints, without those of one that is being written, replaced or removed."""
    return [path for path in folder.glob(pattern) if UNFINISHED not in path.parent.name]


def _replace(final: Path, new: Path) -> None:
    """Put a folder in another one's place, so that one of the two is there whole whenever the machine stops."""
    aside = final.with_name(final.name + ASIDE)
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        final.rename(aside)
    try:
        new.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _put_back(folder: Path) -> None:
    """Undo a replacement that a killed server had half done."""
    for aside in folder.glob(f"*{ASIDE}"):
        final = aside.with_name(aside.name.removesuffix(ASIDE))
        if not final.exists():
            aside.rename(final)
            sync(folder)


def _pack(checkpoint: Checkpoint, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(checkpoint.directory.iterdir()):
            tar.add(path, arcname=path.name)


def _expiry(ttl_seconds: int | None) -> str | None:
    if ttl_seconds is None:
        return None
    if not 0 <= ttl_seconds <= LONGEST_S:
        raise UsageError(
            f"ttl_seconds is {ttl_seconds}; it must be from 0 to {LONGEST_S} (ten years), or None for ever"
        )
    return (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat()


def _expired(until: str | None) -> bool:
    return until is not None and datetime.fromisoformat(until) <= datetime.now(UTC)
