from __future__ import annotations

import statistics

import pytest

from tercet.rewards.scaling import Moments, scaled, with_missing_ends


def close(values):
    return pytest.approx(values, abs=1e-9)


def test_moments_of_batches_are_those_of_all_numbers_together():
    batches = [[1.0, 2.0], [4.0], [-3.0, 0.5, 7.0]]
    seen = Moments()
    for batch in batches:
        seen = seen.with_batch(batch)
    every = [x for batch in batches for x in batch]
    assert (seen.count, seen.mean) == (6, close(statistics.fmean(every)))
    assert seen.variance == close(statistics.pvariance(every))
    assert seen.std == close(statistics.stdev(every))


def test_one_number_has_no_spread_to_be_divided_by():
    assert Moments().with_batch([5.0]).std == 1.0


def test_scores_are_divided_by_what_was_seen_so_far_then_bounded():
    seen = Moments(count=2, mean=3.0, variance=2.0)  # standard deviation (n - 1): 2
    assert scaled([5.0, 1.0], seen, how="none", clip=None) == [5.0, 1.0]
    assert scaled([5.0, 1.0], seen, how="std", clip=None) == pytest.approx([2.5, 0.5], abs=1e-7)
    assert scaled([5.0, 1.0], seen, how="mean_std", clip=None) == pytest.approx([1.0, -1.0], abs=1e-7)
    assert scaled([5.0, -9.0, 0.2], seen, how="none", clip=0.5) == [0.5, -0.5, 0.2]


def test_a_missing_end_is_paid_for_or_replaced():
    scores, ended = [2.0, 3.0], [True, False]
    assert with_missing_ends(scores, ended, how="none", value=1.0) == [2.0, 3.0]
    assert with_missing_ends(scores, ended, how="penalise", value=1.0) == [2.0, 2.0]
    assert with_missing_ends(scores, ended, how="replace", value=-1.0) == [2.0, -1.0]
