"""Files of JSON rows: appended while a run goes on, read back, cut where it resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tercet.errors import CheckpointError
from tercet.runs.durable import beside, sync

Row = dict[str, Any]


def encode_row(row: Mapping[str, object]) -> bytes:
    r"""One line of valid JSON: numbers that are not finite become null, for JSON has no word for them.

    >>> encode_row({"step": 3, "loss": float("nan")})
    b'{"step": 3, "loss": null}\n'
    """
    # A lone surrogate, which UTF-8 cannot hold, is written as the escape that JSON has for it.
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows at the end of `path`."""
    with path.open("ab") as file:
        file.write(b"".join(encode_row(row) for row in rows))


def read_rows(path: Path) -> list[Row]:
    """All rows of `path`; none when it does not exist. A torn last line, left by a kill in mid-write, is skipped.

    Raises:
        CheckpointError: A line before the last cannot be read.
    """
    parsed = list(_parse(path))
    for number, row in enumerate(parsed[:-1], start=1):
        if row is None:
            raise CheckpointError(
                f"{path}:{number} is not a row of JSON; the file is damaged: repair or delete the line"
            )
    return [row for row in parsed if row is not None]


def steps_written(path: Path) -> int:
    """The highest step in `path` plus 1; 0 when it holds none. Lines that cannot be read are passed over."""
    return max((row["step"] + 1 for row in _parse(path) if row is not None), default=0)


def cut_rows(path: Path, *, step: int) -> None:
    """Drop the rows of `step` and later, and whatever follows the last readable row. All or nothing.

    Raises:
        CheckpointError: A line between rows that must stay cannot be read.
    """
    keeps: list[bool] = []
    unreadable: list[int] = []
    for row in _parse(path):
        keeps.append(row is not None and row["step"] < step)
        if row is None:
            unreadable.append(len(keeps))
        elif keeps[-1] and unreadable:
            raise CheckpointError(
                f"{path}:{unreadable[0]} is not a row of JSON, though rows before and after it are; "
                "the file is damaged: repair or delete that line, then type the same command again"
            )
    if all(keeps):
        return
    temporary = beside(path)
    with path.open("rb") as old, temporary.open("wb") as new:
        new.writelines(line for line, keep in zip(old, keeps, strict=True) if keep)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def _parse(path: Path) -> Iterator[Row | None]:
    """One entry per line, None where it is no JSON object or lacks its line end."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            yield _parse_line(line) if line.endswith(b"\n") else None


def _parse_line(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
