from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import ConfigError
from tercet.rewards.tournament import flip_rate, matches, scores


def test_three_answers_by_hand():
    # 2 beats both, 0 and 1 draw; each plays four matches.
    margins = {(0, 1): 0.2, (1, 0): 0.2, (0, 2): 1.0, (2, 0): -1.0, (1, 2): 0.5, (2, 1): -0.7}
    assert scores(3, margins) == pytest.approx([
        (-0.2 + 0.2 - 1.0 - 1.0) / 4,
        (0.2 - 0.2 - 0.5 - 0.7) / 4,
        (1.0 + 1.0 + 0.5 + 0.7) / 4,
    ])  # fmt: skip


def test_both_ways_is_every_ordered_pair_and_one_way_each_pair_once():
    assert sorted(matches(4)) == sorted(itertools.permutations(range(4), 2))
    assert matches(4, pattern="one_way") == list(itertools.combinations(range(4), 2))


def test_answers_meet_inside_their_chunk_only():
    assert matches(5, pattern="one_way", chunk=3) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert len(matches(8, chunk=4)) == 2 * 4 * 3


@pytest.mark.parametrize(("n", "chunk"), [(1, None), (0, None), (5, 4), (9, 4), (4, 1), (3, 2)])
def test_an_answer_that_would_meet_nobody_is_refused(n, chunk):
    with pytest.raises(ConfigError, match="leaves an answer that meets nobody"):
        matches(n, chunk=chunk)


def test_scores_of_an_answer_without_a_match_are_refused():
    with pytest.raises(ValueError, match="answer 2 met nobody"):
        scores(3, {(0, 1): 1.0})


STRENGTHS = st.lists(st.integers(-4, 4), min_size=2, max_size=6)


@given(STRENGTHS, st.integers(-3, 3))
def test_a_bias_for_a_place_cancels_both_ways(strengths, bias):
    n = len(strengths)
    fair = {(i, j): float(strengths[j] - strengths[i]) for i, j in matches(n)}
    biased = {match: margin + bias for match, margin in fair.items()}
    assert scores(n, biased) == pytest.approx(scores(n, fair))


def test_a_bias_for_a_place_stays_one_way():
    # Equal answers, a judge that always prefers what is shown second by a half.
    one_way = dict.fromkeys(matches(3, pattern="one_way"), 0.5)
    assert scores(3, one_way) == [-0.5, 0.0, 0.5]
    assert scores(3, dict.fromkeys(matches(3), 0.5)) == [0.0, 0.0, 0.0]


@given(st.integers(2, 6), st.sampled_from(["both_ways", "one_way"]), st.randoms())
def test_scores_are_zero_sum_and_bounded(n, pattern, random):
    found = scores(n, {match: random.uniform(-1, 1) for match in matches(n, pattern=pattern)})
    assert sum(found) == pytest.approx(0, abs=1e-12)
    assert all(-1 <= score <= 1 for score in found)


def test_scores_follow_the_answers_not_their_order():
    margins = {(i, j): (j * j - i) / 20 for i, j in matches(4)}
    moved = {(3 - i, 3 - j): margin for (i, j), margin in margins.items()}
    assert scores(4, moved) == pytest.approx(scores(4, margins)[::-1])


def test_a_verdict_flips_when_it_stays_with_the_place():
    assert flip_rate({(0, 1): 0.5, (1, 0): 0.5}) == 1.0  # the second wins both times
    assert flip_rate({(0, 1): 0.5, (1, 0): -0.2}) == 0.0
    assert flip_rate({(0, 1): 0.0, (1, 0): 0.5}) == 0.0  # a tie contradicts nothing
    assert flip_rate({(0, 1): 0.5, (1, 0): 0.5, (0, 2): 0.5, (2, 0): -0.5}) == 0.5
    assert flip_rate({(0, 1): 0.5, (1, 2): 0.5}) == 0.0  # nobody met twice
