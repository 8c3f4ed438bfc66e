"""Files of JSON rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.errors import CheckpointError
from tercet.runs.rows import append_rows, cut_rows, read_rows, steps_written


def test_rows_from_a_step_on_are_cut_and_those_before_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": step, "loss": 0.1 * step} for step in range(4)])
    before = path.read_bytes().splitlines(keepends=True)
    cut_rows(path, step=2)
    assert path.read_bytes() == b"".join(before[:2])
    assert steps_written(path) == 2


def test_a_line_damaged_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"rows\.jsonl:2 "):
        read_rows(path)
    with pytest.raises(CheckpointError, match=r"rows\.jsonl:2 "):
        cut_rows(path, step=3)
    cut_rows(path, step=1)
    assert path.read_bytes() == b'{"step": 0}\n'


def test_a_missing_file_has_no_rows_and_nothing_to_cut(tmp_path: Path) -> None:
    cut_rows(tmp_path / "rows.jsonl", step=0)
    assert read_rows(tmp_path / "rows.jsonl") == []
    assert list(tmp_path.iterdir()) == []
