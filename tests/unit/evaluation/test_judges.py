from __future__ import annotations

import math

import pytest

from tercet.evaluation.judges import CalibrationBin, agreement, calibration


def table(first, second):
    """(P(A), P(B)) of every pair as it is shown; the rest is on Tie."""
    return {
        ("long good", "bad"): (0.8, 0.1), ("bad", "long good"): (0.2, 0.6),  # right both ways
        ("so", "so so"): (0.3, 0.6), ("so so", "so"): (0.3, 0.6),  # the second wins both ways
        ("worse", "better!"): (0.7, 0.2), ("better!", "worse"): (0.05, 0.9),  # wrong both ways
    }[first, second]  # fmt: skip


def test_every_number_by_hand(judge_of, compare):
    rows = [
        compare("bad", "long good", "B"),
        compare("so", "so so", "A"),
        compare("worse", "better!", "B"),
        compare("bad", "long good", "Tie"),  # says nothing
        compare("bad", "long good"),
    ]
    found = agreement(judge_of(table), rows)
    assert found.n == 3
    # What each verdict gives to the right label, chosen first and chosen second, among A and B.
    shares = [8 / 9, 6 / 8, 3 / 9, 6 / 9, 0.05 / 0.95, 2 / 9]
    assert found.nll == pytest.approx(-sum(map(math.log, (0.8, 0.6, 0.3, 0.6, 0.05, 0.2))) / 6)
    assert found.accuracy == pytest.approx(3 / 6)
    # Both orders together: right; the chosen "so" wins by 0.3 shown second and loses by 0.3 shown first: no; wrong.
    assert found.accuracy_both == pytest.approx(1 / 3)
    assert found.flip_rate == pytest.approx(1 / 3)
    assert found.accuracy_short_chosen == 0.0  # "so"
    assert found.accuracy_long_chosen == 0.5  # "long good" and "better!"
    # Confidences 8/9, 3/4, 2/3, 2/3, 18/19, 7/9 in bins of 0.05 from 0.5; 3/4 and 7/9 share one, as do the two of 2/3.
    assert [p > 0.5 for p in shares] == [True, True, False, True, False, False]
    expected = [(2 / 3, 0.5, 2), ((3 / 4 + 7 / 9) / 2, 0.5, 2), (8 / 9, 1.0, 1), (18 / 19, 0.0, 1)]
    assert [(b.confidence, b.accuracy, b.n) for b in found.calibration] == [pytest.approx(each) for each in expected]
    assert found.ece == pytest.approx(sum(n * abs(c - a) for c, a, n in expected) / 6)


def test_labels_and_places_may_be_exchanged_together(judge_of, compare):
    rows = [compare("bad", "long good", "B"), compare("so", "so so", "A")]
    judge = judge_of(table)
    assert agreement(judge, [row.swapped() for row in rows]) == agreement(judge, rows)


def test_a_perfect_judge_and_a_coin(judge_of, compare):
    rows = [compare("good", "bad", "A"), compare("bad", "good!", "B")]
    perfect = agreement(judge_of(lambda a, b: (1.0, 0.0) if "good" in a else (0.0, 1.0)), rows)
    assert (perfect.accuracy, perfect.accuracy_both, perfect.nll, perfect.ece, perfect.flip_rate) == (1, 1, 0, 0, 0)
    coin = agreement(judge_of(lambda a, b: (0.5, 0.5)), rows)
    assert coin.nll == pytest.approx(math.log(2))
    assert coin.flip_rate == 0  # it has no opinion that could change
    surely_wrong = agreement(judge_of(lambda a, b: (0.0, 1.0) if "good" in a else (1.0, 0.0)), rows)
    assert math.isfinite(surely_wrong.nll) and surely_wrong.ece == 1


def test_no_rows_of_a_kind_give_nan_and_no_decided_rows_are_refused(judge_of, compare):
    found = agreement(judge_of(table), [compare("bad", "long good", "B")])
    assert math.isnan(found.accuracy_short_chosen) and found.accuracy_long_chosen == 1
    with pytest.raises(ValueError, match="no decided comparison"):
        agreement(judge_of(table), [compare("bad", "long good", "Tie")])


def test_confidences_fall_into_bins_of_a_twentieth_and_the_last_takes_certainty():
    assert calibration([0.5, 0.45, 0.56, 1.0, 0.96]) == [
        CalibrationBin(pytest.approx(0.5), 0.0, 1),
        CalibrationBin(pytest.approx(0.555), 0.5, 2),
        CalibrationBin(pytest.approx(0.98), 1.0, 2),
    ]
