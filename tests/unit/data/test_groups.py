from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from tercet.data import load_comparisons, load_conversations
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


# What REFUEL writes where the policy says nothing, in the dialogue before the branch, at it, and after it.
SILENT = Group(
    (Message("user", "Well?"), Message("assistant", ""), Message("user", "Go on.")),
    (
        Sampled("", (2,), (-0.5,), "eos", 0.5, (Message("user", "And?"), Message("assistant", ""))),
        Sampled(" \n", (4, 2), (-1.0, -0.5), "eos", -1.0),
    ),
    (1, 2, 3),
)


@pytest.mark.parametrize("columns", ["tercet", "published"])
def test_a_policy_that_says_nothing_is_read_back_where_its_token_ids_are(columns):
    row = json.loads(json.dumps(SILENT.row(columns)))
    assert group_of(row, "row 1") == SILENT


@pytest.mark.parametrize("lacking", ["prompt_tokens", "tokens"])
def test_turns_without_words_and_without_token_ids_are_refused_by_their_row(lacking):
    row = json.loads(json.dumps(SILENT.row()))
    (row if lacking in row else row["completions"][0]).pop(lacking)
    with pytest.raises(DataError, match="row 7: a turn of assistant is empty"):
        group_of(row, "row 7")


def test_a_turn_of_the_user_has_words_wherever_it_stands():
    row = SILENT.row()
    row["prompt"][-1]["content"] = ""
    with pytest.raises(DataError, match="row 7: a turn of user is empty"):
        group_of(row, "row 7")


@pytest.mark.parametrize("columns", ["tercet", "published"])
def test_whatever_else_a_row_says_of_itself_or_of_an_answer_is_kept(columns):
    row = {
        "prompt": "Well?",
        "response_source": "web",
        "responses": 2,
        "response_0": "Yes.",
        "response_0_reward": 0.5,
        "response_0_judge": "a",
        "response_1": "No.",
    }
    found = group_of(row, "row 1")
    assert found.columns == {"response_source": "web", "responses": 2}
    assert [each.columns for each in found.answers] == [{"judge": "a"}, {}]
    assert group_of(json.loads(json.dumps(found.row(columns))), "row 1") == found
    assert found.row("published") == row


def test_answers_that_are_null_are_none():
    row = {"prompt": "Well?", "response_0": "Yes.", "response_1": None, "response_1_reward": math.nan}
    row |= {"response_10": "Maybe.", "response_2": "No.", "response_2_tokens": None}
    found = group_of(row, "row 1")
    assert (found.answers, found.columns) == ((Sampled("Yes."), Sampled("No."), Sampled("Maybe.")), {})


@pytest.mark.parametrize("said", [math.nan, math.inf, -math.inf, "nan"])
def test_a_reward_that_is_no_number_is_read_for_prepare_to_count(tmp_path, said):
    row = {"prompt": "Well?", "completions": [{"text": "Yes.", "reward": said}, {"text": "No.", "reward": 1}]}
    [group] = load_groups(write(tmp_path / "scored.jsonl", [row]))
    assert [math.isfinite(each.reward) for each in group.answers] == [False, True]


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


@pytest.mark.parametrize("prompt", [PROMPT, SILENT.prompt])
@pytest.mark.parametrize("silent", ["chosen", "rejected"])
def test_a_pair_with_an_answer_without_words_is_read_as_pair_as_comparison_and_to_fine_tune_on(
    tmp_path, prompt, silent
):
    pair = RankedPair(prompt, Sampled("Yes.", (5, 2), reward=1.0), Sampled("No.", (7, 2), reward=0.0), (1, 2, 3))
    pair = replace(pair, **{silent: replace(getattr(pair, silent), text="", tokens=(2,))})
    path = write(tmp_path / "pairs.jsonl", [pair.row()])
    assert load_ranked_pairs(path) == [pair]
    [row] = load_comparisons(path).rows
    assert (row.prompt, row.chosen[0].content, row.rejected[0].content) == (
        prompt,
        pair.chosen.text,
        pair.rejected.text,
    )
    assert load_conversations(path).rows == [(*prompt, *pair.chosen.conversation)]


@pytest.mark.parametrize("side", ["chosen", "reject"])
@pytest.mark.parametrize("words", ["", " \n"])
def test_an_answer_without_words_and_without_token_ids_is_refused_by_its_row(tmp_path, side, words):
    row = RankedPair(PROMPT, *GROUP.answers).row()
    row[side] = words
    del row[f"{side}_tokens"]
    path = write(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(DataError, match=rf"pairs.jsonl:1: '{side}' is empty"):
        load_ranked_pairs(path)


def test_groups_of_a_file_keep_their_order(tmp_path):
    rows = [replace(GROUP, prompt=(Message("user", f"{i}?"),)).row() for i in range(5)]
    assert [each.prompt[0].content for each in load_groups(write(tmp_path / "a.jsonl", rows))] == [
        f"{i}?" for i in range(5)
    ]
