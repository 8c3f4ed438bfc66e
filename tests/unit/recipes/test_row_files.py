from __future__ import annotations

import json

import pytest

from tercet.data.files import read_file
from tercet.errors import ConfigError, UsageError
from tercet.recipes.row_files import check_new, write_rows, write_whole


class Stopped(Exception):
    pass


def rows_until(dies_at=None, asked=None):
    """Rows 0, 1, 2 …; the process dies when it should make the row `dies_at`."""

    def make(at, end):
        for i in range(at, end):
            if i == dies_at:
                raise Stopped
            if asked is not None:
                asked.append(i)
            yield {"i": i, "text": "é\u2028" * i}

    return make


def write(out, make, total=7, settings=None):
    return write_rows(out, settings or {"seed": 0}, total, make, verb="test", at_once=3)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("dies_at", [0, 2, 3, 5, 6])
def test_a_stopped_file_goes_on_after_its_last_whole_part(tmp_path, suffix, dies_at):
    wanted = write(tmp_path / f"wanted.{suffix}", rows_until())
    out, asked = tmp_path / f"rows.{suffix}", []
    with pytest.raises(Stopped):
        write(out, rows_until(dies_at))
    assert not out.exists()
    write(out, rows_until(asked=asked))
    assert asked == list(range(dies_at // 3 * 3, 7))
    assert [row for _, row in read_file(out)] == [row for _, row in read_file(wanted)]
    assert {path.name for path in tmp_path.iterdir()} == {out.name, wanted.name}


def test_a_torn_line_and_half_a_part_are_made_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Stopped):
        write(out, rows_until(3))
    part = tmp_path / "rows.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"i": 3, "text": "half"}\n{"i": 4, "te')
    write(out, rows_until())
    assert [row["i"] for _, row in read_file(out)] == list(range(7))
    assert json.loads(out.read_text().split("\n")[3]) == {"i": 3, "text": "é\u2028" * 3}


def test_a_file_begun_with_other_settings_is_not_gone_on_with(tmp_path):
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Stopped):
        write(out, rows_until(3))
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        write(out, rows_until(), settings={"seed": 1})


def test_a_file_that_is_there_and_one_of_another_kind_are_refused(tmp_path):
    write_whole(tmp_path / "rows.jsonl", [{"i": 1}])
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
        check_new(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=r"ends in none of .jsonl, .parquet"):
        check_new(tmp_path / "rows.csv")
