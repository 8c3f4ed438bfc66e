"""Dialogues of a bandit: every answer is one of four letters, whatever was said before."""

from __future__ import annotations

import pytest

from tercet.algorithms.dialogues import Branch, branched, branches
from tercet.algorithms.rollouts import answer
from tercet.types import Message, SamplingParams

PROMPTS = [(Message("user", f"{number}?"),) for number in range(3)]


def grow(one, where, *, n=2, context=512, user=None, seed=3):
    params = SamplingParams(max_tokens=3, stop=one.renderer.stop, seed=seed)
    spoken = user or (lambda dialogues, params: [f"and {len(dialogue)}?" for dialogue in dialogues])
    return branched(PROMPTS, where, one.engine.sampler(), one.renderer, params, n, user=spoken, context_tokens=context)


def test_with_one_turn_it_is_what_is_sampled_without_dialogues(bandit):
    one = bandit()
    params = SamplingParams(max_tokens=3, stop=one.renderer.stop, seed=3)
    plain = answer(PROMPTS, one.engine.sampler(), one.renderer, params, 2)
    found = grow(one, branches(3, 1, seed=0))
    assert [[each.answer for each in group] for group in found] == plain
    assert all(each.after == () for group in found for each in group)


def test_answers_share_what_was_said_before_the_branch_and_go_their_own_ways_after(bandit):
    found = grow(bandit(), [Branch(0, 2), Branch(1, 2), Branch(2, 2)], n=3)
    for at, group in enumerate(found):
        assert len({each.answer.prompt for each in group}) == 1
        before = group[0].answer.prompt
        assert [message.role for message in before] == ["user", "assistant"] * at + ["user"]
        assert before[-1].content == (f"and {2 * at}?" if at else "0?")
        for each in group:
            assert [message.role for message in each.after] == ["user", "assistant"] * (2 - at)
    assert len({each.after for each in found[0]}) > 1


def test_only_the_answer_at_the_branch_is_learned(bandit):
    [_, group, _] = grow(bandit(), [Branch(1, 2)] * 3)
    datum = group[0].answer.datum()
    assert sum(datum.weights) == len(group[0].answer.completion.tokens)
    assert list(datum.tokens[: len(group[0].answer.prompt_tokens)]) == list(group[0].answer.prompt_tokens)


def test_a_dialogue_that_leaves_no_room_ends_before(bandit):
    one = bandit()
    long = len(one.renderer.generation_prompt(PROMPTS[0]))

    def talker(dialogues, params):
        return ["x" * 200 for _ in dialogues]

    found = grow(one, [Branch(0, 2), Branch(2, 2), Branch(0, 0)], context=long + 60, user=talker)
    assert [group[0].answer.prompt for group in found] == PROMPTS
    assert all(each.after == () for group in found for each in group)


def test_a_dialogue_is_the_same_again_and_another_with_another_seed(bandit):
    one, where = bandit(), [Branch(1, 2)] * 3
    assert grow(one, where) == grow(one, where) != grow(one, where, seed=4)


def test_the_user_hears_every_dialogue_that_goes_on(bandit):
    heard = []

    def user(dialogues, params):
        heard.append((len(dialogues), params.seed))
        return ["hm?"] * len(dialogues)

    grow(bandit(), [Branch(0, 0), Branch(1, 1), Branch(1, 2)], user=user)
    assert [count for count, _ in heard] == [2, 2]  # two trunks of one turn; one pair of answers goes on
    assert len({seed for _, seed in heard}) == 2


@pytest.mark.parametrize("turns", [1, 5])
def test_branches_are_drawn_among_the_turns_up_to_an_end(turns):
    found = branches(2000, turns, seed=7)
    assert found == branches(2000, turns, seed=7)
    assert {each.end for each in found} == set(range(turns))
    assert all(0 <= each.at <= each.end for each in found)
    share = sum(each.at == 0 for each in found) / 2000
    # Mean over ends of 1 / (end + 1): 1 with one turn, 137 / 300 with five.
    assert share == pytest.approx(sum(1 / (end + 1) for end in range(turns)) / turns, abs=0.04)
