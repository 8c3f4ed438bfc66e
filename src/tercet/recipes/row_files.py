"""Files of rows that are written in parts, go on after a stop, and appear under their name when they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.errors import DataError, UsageError
from tercet.runs.durable import beside, sync, write_atomically
from tercet.runs.progress import ProgressDisplay
from tercet.runs.rows import append_rows, encode_row
from tercet.runs.settings import keep_config
from tercet.types import Message, as_messages

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".parquet")


def check_new(out: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse a file that is there, or of a kind that is not written.

    Raises:
        UsageError: Says which.
    """
    if out.exists():
        raise UsageError(f"{out} exists, and nothing is overwritten; name another file with --out")
    if out.suffix not in suffixes:
        raise UsageError(f"{out} ends in none of {', '.join(suffixes)}; name a file that does")


def write_rows(
    out: Path,
    made_of: Mapping[str, object],
    total: int,
    make: Callable[[int, int], Iterable[Mapping[str, object]]],
    *,
    verb: str,
    at_once: int,
) -> Path:
    """Write a row for each of `total` things, some at a time.

    They are added to `OUT.part`, which becomes `OUT` when all are there. Stopped and started again with the same
    `made_of`, which is kept in `OUT.part.yaml` meanwhile, it goes on after the last part that is whole.

    Args:
        out: A jsonl, parquet or json file.
        made_of: Settings and hashes that decide the rows.
        total: Rows in all.
        make: Gives the rows from a first to before a last.
        verb: Shown while it goes on.
        at_once: Rows of a part.

    Raises:
        ConfigError: What was begun there is something else.
    """
    part, facts = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.part.yaml")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists():
        facts.unlink(missing_ok=True)
    keep_config(facts, made_of)
    done = _cut(part, at_once, total)
    parts = -(-total // at_once)
    with ProgressDisplay(verb, total_steps=parts, first_step=done // at_once, shown={}) as progress:
        for at in range(done, total, at_once):
            append_rows(part, make(at, min(at + at_once, total)))
            progress.update(at // at_once, {})
    sync(part)
    publish(part, out)
    facts.unlink(missing_ok=True)
    return out


def write_whole(out: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write all rows at once: `out` is there whole, or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.write_bytes(b"".join(encode_row(row) for row in rows))
    sync(part)
    publish(part, out)


def publish(part: Path, out: Path) -> None:
    """Make the finished rows of a jsonl file the file they are for, converted where it is parquet or one json list.

    Raises:
        DataError: A column of a parquet file would hold values of several kinds.
    """
    if out.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(_table([json.loads(line) for line in part.read_bytes().splitlines()], part), beside(out))
        sync(beside(out))
        beside(out).replace(out)
        part.unlink()
    elif out.suffix == ".json":
        write_atomically(out, b"[\n" + b",\n".join(part.read_bytes().splitlines()) + b"\n]\n")
        part.unlink()
    else:
        part.rename(out)
    sync(out.parent)


def _table(rows: Sequence[Mapping[str, Any]], part: Path) -> pyarrow.Table:
    """Rows as a table: every column that any of them has, and prompts all of one kind."""
    import pyarrow

    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    asked = columns.get("prompt", [])
    if any(isinstance(prompt, list) for prompt in asked):
        columns["prompt"] = [as_messages((Message("user", p),)) if isinstance(p, str) else p for p in asked]
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except pyarrow.ArrowException as error:
            raise DataError(
                f"the column '{name}' cannot be written as parquet: {error}. All rows are in {part}, which is jsonl: "
                "rename it, or make the column's values of one kind in the data"
            ) from error
    return pyarrow.table(arrays)


def _cut(part: Path, at_once: int, total: int) -> int:
    """Drop what is not a whole part; say how many rows are left."""
    if not part.exists():
        part.touch()
        return 0
    lines = part.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    done = total if len(whole) == total else len(whole) // at_once * at_once
    with part.open("rb+") as file:
        file.truncate(sum(map(len, whole[:done])))
    return done
