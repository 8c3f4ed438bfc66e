"""Train in children that are killed at the nth change of the disk, for every n; used by test_crash_consistency.py.

Usage: python kill_everywhere.py DIRECTORY. Leaves one folder per n, killed once, some of them once more while they
resumed, and then run to the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from small_trainer import open_run, train

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def train_in_child(directory: Path, *, dies_at: int | None) -> bool:
    """Whether the child was killed."""
    child = os.fork()
    if child == 0:
        if dies_at is not None:
            sys.addaudithook(Killer(directory, dies_at))
        train(open_run(directory))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, f"the child in {directory} failed"
    return False


class Killer:
    """Kills this process, as `kill -9` does, before the nth change to anything in `directory`."""

    def __init__(self, directory: Path, dies_at: int) -> None:
        self.prefix = str(directory)
        self.left = dies_at

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.changes(event, arguments):
            return
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def changes(self, event: str, arguments: tuple[object, ...]) -> bool:
        if not arguments or not str(arguments[0]).startswith(self.prefix):
            # Files deeper in a tree that is deleted are named relative to their directory.
            return event in {"os.remove", "os.rmdir"}
        if event == "open":
            return bool(int(arguments[2]) & (os.O_WRONLY | os.O_RDWR))  # type: ignore[call-overload]
        return event in CHANGES


def main(directory: Path) -> None:
    dies_at, was_killed = 0, True
    while was_killed:
        once, twice = directory / f"{dies_at:03d}-once", directory / f"{dies_at:03d}-twice"
        once.mkdir()
        was_killed = train_in_child(once, dies_at=dies_at)
        if dies_at % 3 == 0:
            shutil.copytree(once, twice)
            train_in_child(twice, dies_at=(7 * dies_at) % 23)
            train_in_child(twice, dies_at=None)
        train_in_child(once, dies_at=None)
        dies_at += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
