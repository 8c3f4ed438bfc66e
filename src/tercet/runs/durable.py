"""Files that survive a power cut: written beside, forced to disk, renamed into place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

UNFINISHED = ".tmp-"
"""Part of the name of everything that is being written or deleted; what still carries it after a crash is rubbish."""


def beside(path: Path) -> Path:
    """Where `path` is written before it is renamed into place."""
    return path.with_name(f"{path.name}{UNFINISHED}{os.getpid()}")


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path`: a reader, and a run after a crash, sees the old content or the new, never a part."""
    temporary = beside(path)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory so that a crash in the middle leaves rubbish that says so, not half a directory."""
    temporary = beside(path)
    path.rename(temporary)
    shutil.rmtree(temporary)


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left half written in `directory`."""
    for path in directory.glob(f"*{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
