from __future__ import annotations

import math

import numpy as np
import pytest

from tercet.evaluation.length_controlled import FOLDS, STRENGTHS, _fit, length_controlled


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_answers_of_equal_length_keep_their_win_rate_but_for_the_penalty():
    # Skill alone: strength * n * (sigmoid(theta) - mean) + 1 = 0, so that the win rate is mean - 1 / (strength * n).
    found = length_controlled([1, 1, 1, 0] * 10, [7] * 40, [9] * 40)
    allowed = [0.75 - 1 / (strength * 40) for strength in STRENGTHS if strength * 40 > 4]
    assert min(abs(found.win_rate - each) for each in allowed) < 1e-9
    assert (found.length, found.n) == (0.0, 40)
    assert found.skill == pytest.approx(math.log(found.win_rate / (1 - found.win_rate)))


def test_a_judge_that_only_counts_characters_finds_a_draw():
    lengths = [100 + 10 * i for i in range(40)]
    baseline = [100 + 10 * ((i * 17) % 40) for i in range(40)]
    spread = float(np.std(np.array(baseline) - np.array(lengths), ddof=1))
    # The preferences are the model's own, with theta = 0 and phi = -2.
    wins = [sigmoid(-2 * math.tanh((b - a) / spread)) for a, b in zip(lengths, baseline, strict=True)]
    found = length_controlled(wins, lengths, baseline)
    assert found.win_rate == pytest.approx(0.5, abs=1e-4)
    assert found.length == pytest.approx(-2, abs=0.01)


def test_a_better_policy_that_is_also_longer_is_credited_with_its_skill_alone():
    lengths = [200 + 7 * (i % 11) for i in range(60)]
    baseline = [150 + 9 * (i % 13) for i in range(60)]
    spread = float(np.std(np.array(baseline) - np.array(lengths), ddof=1))
    wins = [sigmoid(0.5 - 1.5 * math.tanh((b - a) / spread)) for a, b in zip(lengths, baseline, strict=True)]
    found = length_controlled(wins, lengths, baseline)
    assert np.mean(wins) > 0.7
    assert found.win_rate == pytest.approx(sigmoid(0.5), abs=1e-3)
    # The preferences lie on the curve itself: nothing is left over for an error.
    assert found.stderr < 1e-3


def test_exchanged_roles_give_one_minus_the_win_rate():
    wins, lengths = [1, 0, 0.5, 1, 0, 0, 1, 0.5] * 5, [50 + i for i in range(40)]
    baseline = [60 + (i * 7) % 23 for i in range(40)]
    there, back = (
        length_controlled(wins, lengths, baseline),
        length_controlled([1 - p for p in wins], baseline, lengths),
    )
    assert there.win_rate + back.win_rate == pytest.approx(1)
    assert there.length == pytest.approx(back.length)


def test_difficulty_is_predicted_for_each_prompt_and_then_averaged():
    difficulty = [0.25 * (i % 9) - 1 for i in range(90)]
    wins = [sigmoid(0.3 + 0.8 * d) for d in difficulty]
    lengths, baseline = [100 + (i * 31) % 50 for i in range(90)], [110 + (i * 17) % 45 for i in range(90)]
    found = length_controlled(wins, lengths, baseline, difficulty)
    assert found.win_rate == pytest.approx(np.mean(wins), abs=1e-3)
    assert found.skill == pytest.approx(0.3, abs=0.01)


def test_the_error_of_skill_alone_is_that_of_a_share():
    found = length_controlled([1, 0, 1, 1] * 25, [5] * 100, [5] * 100)
    # The sandwich of a logistic mean: sqrt(mean of (y - p)^2 / n), here near sqrt(0.75 * 0.25 / 100).
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 100), rel=0.01)


def test_the_fit_lies_where_no_weight_wants_to_move():
    rng = np.random.default_rng(0)
    features = np.stack([np.ones(30), np.tanh(rng.normal(size=30))], axis=1)
    wins = rng.uniform(size=30)
    for strength in (0.01, 1.0, 1e4):
        weights = _fit(features, wins, strength)
        slope = strength * features.T @ (1 / (1 + np.exp(-features @ weights)) - wins)
        for weight, each in zip(weights, slope, strict=True):
            assert abs(each) <= 1 + 1e-6 if weight == 0 else each == pytest.approx(-math.copysign(1, weight), abs=1e-5)


def test_policies_that_always_win_or_meet_only_twice_have_a_number_too():
    assert 0.5 < length_controlled([1.0] * 20, list(range(20)), [3] * 20).win_rate < 1
    assert 0 <= length_controlled([1.0, 0.0], [1, 2], [2, 5]).win_rate <= 1
    assert length_controlled([0.5] * 2 * FOLDS, [1] * 10, [2] * 10).win_rate == 0.5


def test_one_prompt_and_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="at least 2 prompts"):
        length_controlled([1.0], [1], [2])
    with pytest.raises(ValueError, match="got 2, 2 and 1"):
        length_controlled([1.0, 0.0], [1, 2], [2])
