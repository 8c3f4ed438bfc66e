"""The built-in corpus is what its data card says, and cannot be judged by length."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from tercet.data import load_comparisons, load_conversations, load_prompts
from tercet.data.sources import BUILTIN
from tercet.data.turns import opening
from tercet.types import Comparison, Conversation, Message

pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in BUILTIN.values()), reason="the built-in corpus is not there"
)
SPLITS = ("train", "test")


def words(conversation: Conversation) -> int:
    return sum(len(turn.content.split()) for turn in conversation)


def length_baseline(comparisons: Sequence[Comparison]) -> float:
    """The share that length alone gets right at best: the shorter, the longer, or the nearer to the best length.

    Answers that such a rule values alike count half.
    """
    lengths = [
        tuple(sum(len(turn.content) for turn in answer) for answer in (row.chosen, row.rejected)) for row in comparisons
    ]

    def share(best: int) -> float:
        gaps = [(abs(chosen - best), abs(rejected - best)) for chosen, rejected in lengths]
        return sum(0.5 if a == b else float(a < b) for a, b in gaps) / len(gaps)

    # Nearest to 0 is the shorter one; nearest to a length that nothing reaches, the longer.
    return max(share(best) for best in (*range(0, 400), 10**6))


def raw(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in BUILTIN[name].read_text(encoding="utf-8").split("\n") if line]


def test_length_baseline_takes_the_better_direction() -> None:
    row = load_comparisons("builtin").rows[0]
    longer = Comparison(row.prompt, row.a, row.a + row.b, "B")
    assert length_baseline([longer, longer, longer.swapped(), Comparison(row.prompt, row.a, row.a, "A")]) == 0.875
    two, six, ten = ((Message("assistant", "x" * n),) for n in (2, 6, 10))
    assert length_baseline([Comparison(row.prompt, six, two, "A"), Comparison(row.prompt, ten, six, "B")]) == 1


def test_there_are_at_least_200_conversations_and_400_comparisons_80_of_them_held_out() -> None:
    conversations = {split: load_conversations("builtin", split=split).rows for split in SPLITS}
    comparisons = {split: load_comparisons("builtin", split=split).rows for split in SPLITS}
    assert sum(map(len, conversations.values())) >= 200
    assert conversations["test"]
    assert sum(map(len, comparisons.values())) >= 400
    assert len(comparisons["test"]) >= 80


@pytest.mark.parametrize("name", ["conversations", "comparisons"])
def test_every_row_is_in_a_split_and_of_one_of_at_least_12_kinds(name: str) -> None:
    rows = raw(name)
    assert {row["split"] for row in rows} == set(SPLITS)
    assert len({row["kind"] for row in rows}) >= 12


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_of_the_corpus_is_left_out(split: str) -> None:
    for load in (load_conversations, load_comparisons):
        assert load("builtin", split=split).dropped == {}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_have_at_most_60_words(split: str) -> None:
    for row in load_comparisons("builtin", split=split).rows:
        assert max(words(row.a), words(row.b)) <= 60, row
    for conversation in load_conversations("builtin", split=split).rows:
        for turn in conversation:
            assert turn.role != "assistant" or len(turn.content.split()) <= 60, turn


def test_no_two_rows_have_the_same_better_answer() -> None:
    for rows in (
        [row.chosen for split in SPLITS for row in load_comparisons("builtin", split=split).rows],
        [row for split in SPLITS for row in load_conversations("builtin", split=split).rows],
    ):
        said = Counter(row[-1].content.strip().lower() for row in rows)
        assert {answer: count for answer, count in said.items() if count > 1} == {}


def test_no_prompt_is_in_both_splits() -> None:
    asked = {
        split: {
            opening(row)[-1].content.strip().lower()
            for load in (load_prompts, load_conversations)
            for row in load("builtin", split=split).rows
        }
        for split in SPLITS
    }
    assert asked["train"] & asked["test"] == set()


def test_length_alone_judges_less_than_65_in_100_held_out_comparisons_rightly() -> None:
    assert length_baseline(load_comparisons("builtin", split="test").rows) < 0.65
