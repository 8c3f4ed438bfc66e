"""`tercet` commands in processes of their own, with the time and the memory that each took as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.errors import TrainingError, UsageError
from tercet.runs.durable import write_atomically

RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def run_command(name: str, words: Sequence[str], out: Path) -> None:
    """Carry out `tercet WORDS`, or go on with it, unless it is done; what it took is kept in `OUT/NAME.json`.

    Raises:
        UsageError: It was begun with other words.
        TrainingError: It did not come to its end.
    """
    file = out / f"{name}.json"
    kept = record(name, out) or {"command": list(words), "attempts": []}
    if kept["command"] != list(words):
        differ = ", ".join(sorted(set(kept["command"]) ^ set(words)))
        raise UsageError(
            f"{file} is of another command (they differ in {differ}); remove {out / name} and {file} to do it anew, or "
            "name another --out"
        )
    if is_done(name, out):
        print(f"{name}: done before", file=sys.stderr)
        return
    # Written before as well: if this process is killed, what the attempt took is missing, and that is known.
    attempts = kept["attempts"]
    attempts.append({"seconds": None, "peak_gib": None, "code": None})
    write_atomically(file, _text(kept))
    attempts[-1] = attempt(words)
    write_atomically(file, _text(kept))
    check_ended(attempts[-1])


def attempt(words: Sequence[str]) -> dict[str, Any]:
    """Carry out `tercet WORDS` once: seconds, largest resident memory in GiB, and exit code. It speaks on stderr."""
    print(f"tercet {' '.join(words)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "tercet.cli.main", *words]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the command was interrupted as well; it saves, and ends by itself
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = used.ru_maxrss * RSS_UNIT / 2**30
    return {"seconds": time.monotonic() - start, "peak_gib": peak, "code": process.returncode}


def check_ended(attempt: dict[str, Any]) -> None:
    """Refuse to go on after a command that failed.

    Raises:
        TrainingError: Its exit code was not 0.
    """
    if attempt["code"] != 0:
        raise TrainingError(f"the command ended with exit code {attempt['code']}; what it said stands above")


def is_done(name: str, out: Path) -> bool:
    """Whether a command came to its end."""
    kept = record(name, out)
    return kept is not None and kept["attempts"][-1]["code"] == 0


def record(name: str, out: Path) -> dict[str, Any] | None:
    """What is kept of a command; None where it was never begun."""
    file = out / f"{name}.json"
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return found


def taken(name: str, out: Path) -> dict[str, float | None]:
    """Minutes of all attempts together and the largest memory of any; no minutes where an attempt was not measured."""
    kept = record(name, out)
    attempts = kept["attempts"] if kept else []
    measured = [each for each in attempts if each["seconds"] is not None]
    whole = len(measured) == len(attempts) > 0
    return {
        "minutes": sum(each["seconds"] for each in measured) / 60 if whole else None,
        "peak_gib": max((each["peak_gib"] for each in measured), default=None),
    }


def _text(kept: dict[str, Any]) -> str:
    return json.dumps(kept, indent=1) + "\n"
