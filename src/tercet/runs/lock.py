"""One process per run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tercet.errors import UsageError


def lock(directory: Path) -> int:
    """Take the folder for this process and write its id into `run.lock`.

    The kernel holds the lock, so it ends with the process that took it, however that ends: a stale file never stands in
    the way, and an id given to another process since is never mistaken for the owner.

    Returns:
        A file descriptor; closing it gives the folder back.

    Raises:
        UsageError: Another process, or another `Run` of this one, has the folder.
    """
    path = directory / "run.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
        os.close(descriptor)
        raise UsageError(
            f"{directory} is in use by process {owner}; wait until it ends, stop it, or choose another --out"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
