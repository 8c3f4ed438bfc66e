"""Published data loads as it is.

`TERCET_DATA` names a folder that holds hh-harmless, instruction-preferences, oasst and self-instruct.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tercet.data import load_comparisons, load_conversations, load_prompts

DATA = Path(os.environ.get("TERCET_DATA", ""))
pytestmark = pytest.mark.skipif("TERCET_DATA" not in os.environ, reason="TERCET_DATA is not set")


@pytest.mark.parametrize("split", ["train", "test"])
def test_malformed_rows_of_hh_are_about_one_or_two_in_a_hundred_and_counted(split: str) -> None:
    loaded = load_comparisons(str(DATA / "hh-harmless"), split=split)
    assert loaded.shape == "raw HH"
    total = {"train": 1300, "test": 200}[split]
    assert len(loaded.rows) + sum(loaded.dropped.values()) == total
    assert 0 < sum(loaded.dropped.values()) <= 0.03 * total


def test_instruction_preferences_lose_only_rows_with_equal_answers() -> None:
    train, test = (load_comparisons(str(DATA / "instruction-preferences"), split=split) for split in ("train", "test"))
    assert (len(train.rows), train.dropped) == (696, {"both answers are the same": 4})
    assert (len(test.rows), test.dropped) == (100, {})
    assert test.rows[0].prompt[-1].content.endswith("active voice.\nThe decision was made by the team.")


def test_oasst_trees_are_conversations_and_comparisons() -> None:
    source = str(DATA / "oasst")
    assert len(load_conversations(source).rows) >= 100
    pairs = load_comparisons(source).rows
    assert len(pairs) > 500 and all(row.label == "A" and row.prompt[-1].role == "user" for row in pairs)


def test_self_instruct_gives_a_conversation_per_instance() -> None:
    loaded = load_conversations(str(DATA / "self-instruct"))
    assert (loaded.shape, len(loaded.rows), loaded.dropped) == ("self-instruct", 427, {})
    assert all(row[-1].role == "user" for row in load_prompts(str(DATA / "self-instruct")).rows)
