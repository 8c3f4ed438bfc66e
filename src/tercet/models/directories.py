"""Directories of models: where the cache lies, and how a directory is written so that nobody ever sees half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tercet.errors import ModelError, UsageError


def cache_directory() -> Path:
    """Where fetched and made models are kept: `TERCET_CACHE`, else `$XDG_CACHE_HOME/tercet`, else `~/.cache/tercet`."""
    own = os.environ.get("TERCET_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "tercet"


@contextmanager
def made_once(directory: Path) -> Iterator[Path | None]:
    """Yield an empty directory to fill, which then becomes `directory` in one rename; None when it is there already.

    Processes that want the same directory wait for each other. What a killed process left half-made is cleared away.
    When the body raises, nothing is kept.

    Raises:
        ModelError: The place cannot be written.
    """
    if directory.is_dir():
        yield None
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.parent / f".{directory.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ModelError(
            f"{directory.parent} cannot be written ({error}); set TERCET_CACHE to a directory that can"
        ) from error
    try:
        if directory.is_dir():
            yield None
            return
        for stale in directory.parent.glob(f".{directory.name}.making-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with _published(directory) as making:
            yield making
    finally:
        lock.release()


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory to fill, which then becomes `out` in one rename. Nothing is ever overwritten.

    Raises:
        UsageError: `out` exists and is not an empty directory.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists() or out.is_symlink():
        raise UsageError(
            f"{out} exists and is not empty; nothing is overwritten: name a new directory or remove it first"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with _published(out) as making:
        yield making


@contextmanager
def _published(directory: Path) -> Iterator[Path]:
    making = Path(tempfile.mkdtemp(prefix=f".{directory.name}.making-", dir=directory.parent))
    try:
        yield making
        for path in [*making.rglob("*"), making]:
            # mkdtemp and safetensors make things that only their maker can read.
            path.chmod(0o755 if path.is_dir() else 0o644)
            _fsync(path)
        making.rename(directory)
        _fsync(directory.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
