from __future__ import annotations

import math

import pytest
import torch

from tercet.losses.both_orders import both_orders_loss


def rows(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_(True)


def loss_of(logprobs, *, comparisons, decided=(1.0, 1.0), **settings):
    pairs = torch.arange(len(logprobs)).view(-1, 2)
    return both_orders_loss(
        logprobs, chosen=pairs[:, 0], rejected=pairs[:, 1],
        comparisons=torch.tensor(comparisons), decided=torch.tensor(decided), **settings,
    )  # fmt: skip


def test_the_mean_log_odds_of_both_orders_decide():
    # Odds of the right label: 4 when it is A, 1/2 when it is B; their geometric mean is the root of 2.
    values, metrics = loss_of(rows(0.8, 0.2, 0.3, 0.6), comparisons=[7.0, 7.0], label_weight=0.0)
    expected = math.log(1 + 1 / math.sqrt(2))
    assert values.tolist() == pytest.approx([expected, expected], abs=1e-9)
    assert metrics["accuracy"].tolist() == [1.0, 0.0] and metrics["accuracy_both"].tolist() == [1.0, 1.0]
    assert metrics["label_nll"].tolist() == pytest.approx([-math.log(0.8), -math.log(0.3)], abs=1e-9)


def test_what_is_preferred_of_a_place_has_no_gradient():
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([1.3, 0.4], dtype=torch.float64)  # of the label A, in either order; of B 0
    odds = logits + bias
    # The first order wants A, the second B.
    a, b = torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)
    logprobs = torch.stack([a[0], b[0], b[1], a[1]])
    values, _ = loss_of(logprobs, comparisons=[0.0, 0.0], label_weight=0.0)
    (gradient,) = torch.autograd.grad(values.sum(), bias, retain_graph=True)
    assert float(gradient) == pytest.approx(0.0, abs=1e-12)
    values, _ = loss_of(logprobs, comparisons=[0.0, 0.0], label_weight=0.5)
    assert float(torch.autograd.grad(values.sum(), bias)[0]) > 0.1


def test_a_weight_of_one_is_the_likelihood_of_every_label():
    values, _ = loss_of(rows(0.8, 0.2, 0.3, 0.6), comparisons=[0.0, 0.0], label_weight=1.0)
    assert values.tolist() == pytest.approx([-math.log(0.8), -math.log(0.3)], abs=1e-9)


def test_of_a_tie_only_the_likelihood_counts():
    values, _ = loss_of(rows(0.8, 0.2, 0.3, 0.6), comparisons=[0.0, 0.0], decided=[0.0, 0.0], label_weight=0.2)
    assert values.tolist() == pytest.approx([-math.log(0.8), -math.log(0.3)], abs=1e-9)


def test_each_comparison_is_averaged_by_itself_wherever_its_orders_stand():
    probabilities = (0.8, 0.2, 0.1, 0.9, 0.3, 0.6, 0.5, 0.4)
    mixed, _ = loss_of(rows(*probabilities), comparisons=[3.0, 1.0, 3.0, 1.0], decided=[1.0] * 4, label_weight=0.3)
    alone, _ = loss_of(rows(0.8, 0.2, 0.3, 0.6), comparisons=[0.0, 0.0], label_weight=0.3)
    assert mixed[[0, 2]].tolist() == pytest.approx(alone.tolist(), abs=1e-12)
