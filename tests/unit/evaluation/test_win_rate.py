from __future__ import annotations

import math
import statistics

import pytest

from tercet.evaluation.win_rate import WinRate, win_rate
from tercet.types import Message

SKILL = {"best": 3, "good": 2, "fair": 1, "poor": 0}


def opinion(first, second):
    """Prefers the more skilled; of answers one step apart, whatever is shown second."""
    gap = SKILL[second] - SKILL[first]
    return (0.9, 0.1) if gap < -1 else (0.2, 0.7)


def compared(judge, *pairs):
    prompts = [(Message("user", str(i)),) for i in range(len(pairs))]
    ours = [(Message("assistant", ours),) for ours, _ in pairs]
    theirs = [(Message("assistant", theirs),) for _, theirs in pairs]
    return win_rate(judge, prompts, ours, theirs)


PAIRS = (("best", "poor"), ("poor", "best"), ("good", "fair"), ("fair", "fair"), ("best", "fair"))


def test_wins_losses_and_what_the_order_decides_by_hand(judge_of):
    # One win, one loss, a pair that the order decides, equal answers, and one more win.
    rate = compared(judge_of(opinion), *PAIRS)
    scores = [1, 0, 0.5, 0.5, 1]
    assert (rate.win_rate, rate.n) == (0.6, 5)
    assert rate.stderr == pytest.approx(statistics.stdev(scores) / math.sqrt(5))
    # Margins towards the policy, mean of both orders: (0.5 + 0.8) / 2, its opposite, 0, 0, and the first again.
    assert rate.mean_margin == pytest.approx((0.65 - 0.65 + 0 + 0 + 0.65) / 5)


@pytest.mark.parametrize("verdict", ["soft", "hard"])
def test_exchanged_roles_give_one_minus_the_win_rate(judge_of, verdict):
    judge = judge_of(opinion, verdict=verdict)
    rate, swapped = compared(judge, *PAIRS), compared(judge, *((b, a) for a, b in PAIRS))
    assert rate.win_rate + swapped.win_rate == pytest.approx(1)
    assert rate.mean_margin == pytest.approx(-swapped.mean_margin)
    assert rate.stderr == pytest.approx(swapped.stderr)


def test_a_judge_that_only_looks_at_the_place_finds_a_draw(judge_of):
    rate = compared(judge_of(lambda a, b: (0.1, 0.9)), ("best", "poor"), ("good", "fair"))
    assert (rate.win_rate, rate.mean_margin) == (0.5, 0)


def test_equal_answers_are_a_tie_whatever_the_judge_says(judge_of):
    assert compared(judge_of(lambda a, b: (0.9, 0.0)), ("fair", "fair"), ("poor", "poor")).win_rate == 0.5


def test_one_prompt_has_the_widest_error(judge_of):
    assert compared(judge_of(opinion), ("best", "poor")).stderr == 0.5


def test_the_interval_stays_between_nought_and_one():
    rate = WinRate(0.95, 0.1, 4, 0.5)
    assert (rate.low, rate.high) == (pytest.approx(0.754), 1.0)
    assert WinRate(0.1, 0.1, 4, 0.5).low == 0.0
    assert rate.metrics("test/held_out/").keys() == {
        f"test/held_out/win_rate{end}" for end in ("", "_stderr", "_low", "_high")
    }


def test_no_prompts_and_unequal_lengths_are_refused(judge_of):
    with pytest.raises(ValueError, match="no prompts"):
        win_rate(judge_of(opinion), [], [], [])
    with pytest.raises(ValueError, match="zip"):
        win_rate(judge_of(opinion), [(Message("user", "?"),)], [], [])
