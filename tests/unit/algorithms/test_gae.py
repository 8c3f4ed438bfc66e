"""Advantages and whitening in float64 against numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from tercet.algorithms.gae import gae, mean_and_variance, whiten


def close(values):
    return pytest.approx(values, abs=1e-9)


def test_errors_are_discounted_backwards():
    # Errors: 1 + 0.9 x 0.5 - 1 = 0.45; 0 + 0.9 x 0.25 - 0.5 = -0.275; 2 - 0.25 = 1.75. What comes later weighs 0.72.
    last, middle = 1.75, -0.275 + 0.72 * 1.75
    expected = [0.45 + 0.72 * middle, middle, last]
    assert gae([1.0, 0.0, 2.0], [1.0, 0.5, 0.25], gamma=0.9, lam=0.8) == close(expected)


def test_with_lambda_1_it_is_the_return_minus_the_value_and_with_0_the_error_of_one_step():
    rewards, values = [1.0, 0.0, 2.0], [1.0, 0.5, 0.25]
    assert gae(rewards, values, gamma=1.0, lam=1.0) == close([2.0, 1.5, 1.75])
    assert gae(rewards, values, gamma=1.0, lam=0.0) == close([0.5, -0.25, 1.75])


def test_nothing_is_expected_after_the_last_token():
    assert gae([0.0], [3.0], gamma=1.0, lam=0.95) == [-3.0]


def test_rows_are_whitened_together_with_the_variance_over_n_minus_1():
    rows = whiten([[1.0, 2.0], [6.0]])  # mean 3, squares 4 + 1 + 9 = 14, variance 7
    assert [x for row in rows for x in row] == close([(x - 3) / math.sqrt(7 + 1e-8) for x in (1, 2, 6)])
    flat = [x for row in rows for x in row]
    assert (statistics.fmean(flat), statistics.variance(flat)) == (close(0.0), pytest.approx(1.0, abs=1e-8))


def test_without_a_shift_the_mean_stays():
    rows = whiten([[1.0, 2.0], [6.0]], shift=False)
    assert rows[1] == close([3 / math.sqrt(7 + 1e-8) + 3])
    assert mean_and_variance(rows)[0] == close(3.0)


def test_a_short_row_is_not_touched_by_the_length_of_others():
    # Lists have no padding: the returns of a row depend on its own tokens and the batch's moments alone.
    [short, _] = whiten([[1.0], [2.0, 6.0]])
    assert short == whiten([[1.0], [2.0], [6.0]])[0]


def test_equal_numbers_and_a_single_one_are_whitened_to_zero():
    assert whiten([[2.0, 2.0]]) == [[0.0, 0.0]]
    assert whiten([[5.0]]) == [[0.0]]
    assert mean_and_variance([[5.0]]) == (5.0, 0.0)
