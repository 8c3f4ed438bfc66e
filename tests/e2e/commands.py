"""Commands in processes of their own, and what they left in a run's folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MACHINE = ("--model", "tiny", "--threads", 1)
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """`tercet` commands, each in a process of its own; see `command_server.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("command_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def ask(self, **request: Any) -> int:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.answer())

    def start(self, *words: object, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> Started:
        number = next(self.numbers)
        out, err, given = (self.folder / f"{number}.{name}" for name in ("out", "err", "in"))
        if stdin is not None:
            given.write_text(stdin)
        pid = self.ask(
            argv=[str(word) for word in words],
            stdin=None if stdin is None else str(given),
            stdout=str(out),
            stderr=str(err),
            environment=dict(environment or {}),
        )
        return Started(self, pid, out, err)

    def __call__(
        self,
        *words: object,
        code: int = 0,
        stdin: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run a command to its end; `code` is what it must exit with."""
        ended = self.start(*words, stdin=stdin, environment=environment).wait()
        assert ended.code == code, f"exit {ended.code}\n{ended.out}\n{ended.err}"
        return ended

    def close(self) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(timeout=30)


@dataclass(frozen=True)
class Started:
    """A command that is running."""

    line: CommandLine
    pid: int
    out: Path
    err: Path

    def wait(self) -> Ended:
        code = self.line.ask(wait=self.pid)
        return Ended(code, self.out.read_text(), self.err.read_text())

    def stop_when(self, happened: Callable[[], bool], number: signal.Signals, *, timeout_s: float = 60) -> Ended:
        """Send a signal as soon as something happened; the command may be quicker than that."""
        until = time.monotonic() + timeout_s
        while not happened() and self.is_running() and time.monotonic() < until:
            pass  # asked as often as can be: what is waited for may last a millisecond
        if self.is_running():
            os.kill(self.pid, number)
        return self.wait()

    def is_running(self) -> bool:
        # A process that ended stays in the table until it is waited for.
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def learned(run: Path) -> str:
    """A hash of the weights a finished run ended with."""
    done = json.loads((run / "done.json").read_text())
    [weights] = [run / done["checkpoint"] / name for name in WEIGHTS if (run / done["checkpoint"] / name).exists()]
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def measured(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics and samples, but for the clock's."""
    found = [
        json.loads(line)
        for name in ("metrics.jsonl", "samples.jsonl")
        if (run / name).exists()
        for line in (run / name).read_text().splitlines()
    ]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in found]


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file but locks, with when it was written and which one it is."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    found = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}
