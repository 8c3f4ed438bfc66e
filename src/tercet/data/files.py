"""One file of rows. Lines end at "\\n" and nowhere else: U+2028 and its like occur inside rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from tercet.data.turns import Row
from tercet.errors import DataError


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that is not one."""

    reason: str


Rows = Iterator[tuple[str, Row | Unreadable]]
"""Pairs of a place, such as "train.jsonl:17", and the row there."""


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, a .gz left away; None when it is no file of rows."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def read_file(path: Path) -> Rows:
    """The rows of one file.

    Raises:
        DataError: The file cannot be read, or its suffix is not known.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path} ends in none of {', '.join(KINDS)} (.gz may follow); convert it to one of them")
    try:
        yield from KINDS[kind](path)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}. Is it complete?") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _jsonl(path: Path) -> Rows:
    with _open(path) as file:
        yield from _json_lines(path, file)


def _json_lines(path: Path, lines: IO[bytes]) -> Rows:
    for number, line in enumerate(lines, start=1):  # in bytes, only "\n" ends a line
        if line.strip():
            yield f"{path}:{number}", _as_row(line)


def _as_row(line: bytes) -> Row | Unreadable:
    try:
        value = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return Unreadable("not JSON in UTF-8")
    return _object(value)


def _object(value: object) -> Row | Unreadable:
    return value if isinstance(value, Mapping) else Unreadable("not a JSON object")


def _json(path: Path) -> Rows:
    """A list of rows, or, as many files of this name are, one row per line."""
    with _open(path) as file:
        content = file.read()
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(path, io.BytesIO(content))
        return
    try:
        values = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}") from error
    for number, value in enumerate(values, start=1):
        yield f"{path}: row {number}", _object(value)


def _csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline="", errors="strict"))
        try:
            for number, row in enumerate(reader, start=1):
                whole = None not in row and None not in row.values()
                yield f"{path}: row {number}", row if whole else Unreadable("not as many cells as columns")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not in UTF-8: {error}") from error


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error


KINDS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
"""Suffix -> how it is read."""
