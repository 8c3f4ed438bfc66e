"""Against numbers worked out by hand, and the gradient against the formula's."""

from __future__ import annotations

import math

import pytest
import torch

from tercet.losses.bradley_terry import bradley_terry_loss


def evaluated(scores, pairs, margins=None, **settings):
    """Values, gradients of their sum, and metrics, as lists."""
    given = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    chosen, rejected = torch.tensor(pairs).T
    values, metrics = bradley_terry_loss(
        given,
        chosen=chosen,
        rejected=rejected,
        margins=torch.tensor(margins or [0.0] * len(pairs), dtype=torch.float64),
        **settings,
    )
    values.sum().backward()
    return values.tolist(), given.grad.tolist(), {name: each.tolist() for name, each in metrics.items()}


def close(values):
    return pytest.approx(values, abs=1e-9)


def test_it_is_minus_the_log_probability_that_the_chosen_answer_wins():
    values, gradient, metrics = evaluated([math.log(3), 0.0], [(0, 1)])
    assert values == close([math.log(4 / 3)])  # odds 3 to 1
    assert gradient == close([-0.25, 0.25])  # one minus that probability
    assert metrics == {"accuracy": [1.0], "score_gap": close([math.log(3)]), "score": close([math.log(3) / 2])}


def test_equal_scores_cost_ln_2_and_are_not_right():
    values, _, metrics = evaluated([0.7, 0.7], [(0, 1)])
    assert values == close([math.log(2)])
    assert metrics["accuracy"] == [0.0]


def test_a_margin_asks_for_so_much_more():
    values, gradient, metrics = evaluated([2.0, 0.0], [(0, 1)], margins=[2.0])
    assert (values, gradient) == (close([math.log(2)]), close([-0.5, 0.5]))
    assert (metrics["accuracy"], metrics["score_gap"]) == ([1.0], [2.0])


def test_centring_pulls_the_mean_of_both_scores_to_zero():
    values, gradient, _ = evaluated([3.0, 3.0], [(0, 1)], center=0.01)
    assert values == close([math.log(2) + 0.36])
    assert gradient == close([-0.5 + 0.12, 0.5 + 0.12])


def test_a_smoothed_label_is_the_mean_of_both_verdicts():
    values, gradient, _ = evaluated([math.log(3), 0.0], [(0, 1)], label_smoothing=0.1)
    assert values == close([0.9 * math.log(4 / 3) + 0.1 * math.log(4)])
    assert gradient == close([-0.9 * 0.25 + 0.1 * 0.75, 0.9 * 0.25 - 0.1 * 0.75])


def test_answers_of_one_group_may_meet_in_several_pairs():
    values, gradient, _ = evaluated([math.log(2), 0.0, 0.0], [(0, 1), (0, 2)])
    assert values == close([math.log(1.5)] * 2)
    assert gradient == close([-2 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
def test_far_scores_stay_finite(gap):
    values, gradient, _ = evaluated([gap, 0.0], [(0, 1)], label_smoothing=0.1)
    assert math.isfinite(values[0]) and all(map(math.isfinite, gradient))
