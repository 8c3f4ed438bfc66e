from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tercet.algorithms.prepare import SelectionConfig, prepare
from tercet.data.groups import Group, Sampled
from tercet.errors import DataError
from tercet.types import Message


def group(rewards, *, prompt="Well?", texts=None, lengths=None, stops=None, tokens=True):
    n = len(rewards)
    texts = texts or [f"answer {i}" for i in range(n)]
    lengths, stops = lengths or [1] * n, stops or ["stop"] * n
    answers = tuple(
        Sampled(texts[i], (10 + i,) * lengths[i] if tokens else None, None, stops[i], rewards[i]) for i in range(n)
    )
    return Group((Message("user", prompt),), answers, (1, 2, 3) if tokens else None)


def never(prompt, words):
    raise AssertionError("answers that bring tokens are not tokenised again")


def pairs(groups, tokenised=never, **settings):
    found = prepare(SelectionConfig(**settings), groups, tokenised, seed=0)
    return [(each.chosen.text[-1], each.rejected.text[-1]) for each in found.train], found


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [("3", "0")]),
        ({"select": "all_pairs"}, [("1", "0"), ("0", "2"), ("3", "0"), ("1", "2"), ("3", "1"), ("3", "2")]),
        ({"select": "top_k", "top_k": 2}, [("3", "2"), ("1", "0")]),
        ({"select": "top_k", "top_k": 9}, [("3", "2"), ("1", "0")]),
        ({"select": "best"}, [("3", "3")]),
        ({"select": "best", "top_k": 2}, [("3", "3"), ("1", "1")]),
    ],
)
def test_answers_are_paired_as_asked(settings, wanted):
    rewards = [0.0, 0.5, -1.0, 2.0] if settings else [-1.0, 0.5, 0.0, 2.0]
    assert pairs([group(rewards)], **settings)[0] == wanted


def test_of_equal_rewards_the_first_is_the_best_and_the_first_is_the_worst():
    assert pairs([group([0.0, 1.0, 1.0, 0.0])])[0] == [("1", "0")]


def test_whatever_is_left_out_is_counted_by_its_reason():
    groups = [
        group([1.0, 0.0, 0.5], prompt="a", lengths=[5, 1, 1]),
        group([1.0, 0.0, 0.5], prompt="b", stops=["stop", "length", "stop"]),
        group([math.nan, 0.0, 0.5], prompt="c"),
        group([1.0, 0.0], prompt="d", lengths=[9, 1]),
        group([1.0, 0.0], prompt="e", texts=["same", "same "]),
        group([1.0, 0.0], prompt="f"),
    ]
    found = pairs(groups, max_answer_length=4)[1]
    assert found.dropped == {
        "answers of more than 4 tokens": 2,
        "answers that were cut off": 1,
        "answers whose reward is no number": 1,
        "prompts with too few answers left": 1,
        "pairs of equal answers": 1,
    }
    assert [pair.prompt[0].content for pair in found.train] == ["a", "b", "c", "f"]
    assert found.describe()[-1] == "kept: 4 to learn, 0 held out"


def test_prompts_over_the_limit_are_left_out_and_counted():
    long = Group((Message("user", "long"),), group([1.0, 0.0]).answers, (1,) * 9)
    found = pairs([long, group([1.0, 0.0])], max_prompt_length=8)[1]
    assert found.dropped == {"prompts of more than 8 tokens": 1} and len(found.train) == 1


def test_answers_that_were_cut_off_can_be_kept():
    assert pairs([group([1.0, 0.0], stops=["length", "stop"])], drop_unfinished=False)[0] == [("0", "1")]


def test_all_pairs_of_a_prompt_are_held_out_together_and_by_the_seed():
    groups = [group([1.0, 0.0, 0.5], prompt=str(i)) for i in range(30)]
    config = SelectionConfig(select="all_pairs", test_rows=9)
    found, again, other = (prepare(config, groups, never, seed=seed) for seed in (0, 0, 1))
    asked = [{pair.prompt for pair in split} for split in (found.train, found.test)]
    assert not asked[0] & asked[1] and [len(each) for each in asked] == [27, 3]  # a tenth at most
    assert found == again != other


def test_prompts_that_come_again_or_begin_alike_are_held_out_together():
    begun = (Message("user", "3"), Message("assistant", "Well?"), Message("user", "More."))
    groups = [group([1.0, 0.0], prompt=str(i % 20)) for i in range(40)]
    groups.append(replace(groups[3], prompt=begun))
    for seed in range(5):
        found = prepare(SelectionConfig(), groups, never, seed=seed)
        first = [{pair.prompt[0] for pair in split} for split in (found.train, found.test)]
        assert not first[0] & first[1] and [len(each) for each in first] == [18, 2]  # a tenth of 20 prompts
        assert len(found.train) + len(found.test) == 41


def test_one_prompt_over_and_over_is_learned_and_none_held_out():
    found = prepare(SelectionConfig(), [group([1.0, 0.0])] * 30, never, seed=0)
    assert (len(found.train), found.test) == (30, [])


def test_equal_answers_are_taken_once_the_first_of_them_and_counted():
    same = group([3.0, 3.0, 2.0, 1.0, 1.0], texts=["a 0", "a 0 ", "a 2", "a 3", "a 3"])
    for select, wanted in (("best", [("0", "0"), ("2", "2")]), ("top_k", [("0", "3")])):
        found, prepared = pairs([same], select=select, top_k=2)
        assert found == wanted
        assert prepared.dropped == {"answers equal to another one of their prompt": 2}


def test_it_is_known_at_which_temperatures_answers_were_drawn():
    told = [replace(group([1.0, 0.0]), columns={"sampling_temperature": t}) for t in (1.0, 0.5, 1, None, "hot")]
    assert pairs([*told, group([1.0, 0.0])])[1].temperatures == (0.5, 1.0)


def test_tokens_of_the_prompt_alone_are_made_where_they_alone_are_missing():
    groups = [replace(group([1.0, 0.0, 0.5]), prompt_tokens=None)]
    [pair] = prepare(SelectionConfig(), groups, lambda prompt, words: ((4, 4), (9, 9)), seed=0).train
    assert (pair.prompt_tokens, pair.chosen.tokens, pair.rejected.tokens) == ((4, 4), (10,), (11,))


def test_sampled_tokens_are_kept_as_they_were_and_missing_ones_made():
    assert pairs([group([1.0, 0.0])])[1].train[0].chosen.tokens == (10,)
    made = prepare(
        SelectionConfig(), [group([1.0, 0.0], tokens=False)], lambda prompt, words: ((4, 4), (ord(words[-1]),)), seed=0
    )
    [pair] = made.train
    assert (pair.prompt_tokens, pair.chosen.tokens, pair.rejected.tokens) == ((4, 4), (ord("0"),), (ord("1"),))


def test_answers_without_rewards_are_refused():
    with pytest.raises(DataError, match="group 1 has an answer without a reward; run tercet score"):
        pairs([group([1.0, None])])


def test_when_nothing_is_left_the_reasons_are_said():
    with pytest.raises(DataError, match="of 1 groups nothing is left to learn: 1 pairs of equal answers"):
        pairs([group([1.0, 0.0], texts=["same", "same"])])
