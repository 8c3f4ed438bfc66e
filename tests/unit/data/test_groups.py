from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tercet.data import load_comparisons
from tercet.data.groups import Group, RankedPair, Sampled, group_of, load_groups, load_ranked_pairs, rewarded
from tercet.errors import DataError
from tercet.types import Message

PROMPT = (Message("user", "Well?"),)
GROUP = Group(
    PROMPT,
    (Sampled("Yes.", (5, 6), (-0.5, -0.25), "stop", 0.5), Sampled("No.", (7,), (-1.0,), "length", -1.0)),
    (1, 2, 3),
    {"source": "here"},
)


@pytest.mark.parametrize("columns", ["tercet", "published"])
def test_a_group_reads_back_equal_from_either_kind_of_row(columns):
    row = json.loads(json.dumps(GROUP.row(columns)))
    assert group_of(row, "row 1") == GROUP


def test_a_published_row_has_the_published_names():
    row = GROUP.row("published")
    assert (row["prompt"], row["response_0"], row["response_1"]) == ("Well?", "Yes.", "No.")
    assert (row["response_0_reward"], row["response_1_reward"]) == (0.5, -1.0)
    assert row["response_0_tokens"] == [5, 6] and row["prompt_tokens"] == [1, 2, 3]


def test_a_published_row_without_ids_or_rewards_is_read():
    found = group_of({"prompt": "Well?", "response_0": "Yes.", "response_1": "No."}, "row 1")
    assert found == Group(PROMPT, (Sampled("Yes."), Sampled("No.")))
    assert [each.reward for each in rewarded(found, [1.0, 2.0]).answers] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Well?"}, "neither 'completions' nor 'response_0'"),
        ({"prompt": "Well?", "completions": []}, "'completions' is empty"),
        ({"prompt": "Well?", "completions": ["Yes."]}, "must be a list of objects"),
        ({"prompt": "Well?", "response_0": 3}, "an answer is int; it must be text"),
        ({"prompt": "Well?", "response_0": "a", "response_0_tokens": "b"}, "must be a list of token ids"),
        ({"prompt": "Well?", "response_0": "a", "response_0_reward": "much"}, "it must be a number"),
    ],
)
def test_what_is_no_group_is_refused_by_its_row(row, said):
    with pytest.raises(DataError, match=r"row 7: ") as refused:
        group_of(row, "row 7")
    assert said in str(refused.value)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_read_back_equal_and_are_comparisons_too(tmp_path):
    pair = RankedPair(PROMPT, replace(GROUP.answers[0], logprobs=None, stop_reason=None),
                      replace(GROUP.answers[1], logprobs=None, stop_reason=None), (1, 2, 3))  # fmt: skip
    path = write(tmp_path / "pairs.jsonl", [pair.row()])
    assert load_ranked_pairs(path) == [pair]
    [row] = load_comparisons(path).rows
    assert (row.prompt, row.chosen[0].content, row.rejected[0].content) == (PROMPT, "Yes.", "No.")


def test_published_pairs_may_repeat_their_prompt(tmp_path):
    asked = {"role": "user", "content": "Well?"}
    row = {
        "prompt": "Well?",
        "chosen": [asked, {"role": "assistant", "content": "Yes."}],
        "reject": [asked, {"role": "assistant", "content": "No."}],
        "chosen_reward": 0.2,
        "reject_reward": 0.1,
    }
    [pair] = load_ranked_pairs(write(tmp_path / "pairs.jsonl", [row]))
    assert (pair.chosen, pair.rejected) == (Sampled("Yes.", reward=0.2), Sampled("No.", reward=0.1))


def test_a_pair_without_a_reward_is_refused_by_its_row(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "reject": "c", "chosen_reward": 1}])
    with pytest.raises(DataError, match=r"pairs.jsonl:1: 'reject_reward' is missing"):
        load_ranked_pairs(path)


def test_groups_of_a_file_keep_their_order(tmp_path):
    rows = [replace(GROUP, prompt=(Message("user", f"{i}?"),)).row() for i in range(5)]
    assert [each.prompt[0].content for each in load_groups(write(tmp_path / "a.jsonl", rows))] == [
        f"{i}?" for i in range(5)
    ]
