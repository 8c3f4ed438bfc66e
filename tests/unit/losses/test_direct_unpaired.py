"""Losses on labelled answers in float64 against the formulas worked out with `math`."""

from __future__ import annotations

import math

import pytest
import torch

from tercet.losses import LOSSES

POLICY, REFERENCE, GOOD = [-4.0, -2.5, -6.0], [-5.0, -2.0, -5.5], [1.0, 1.0, 0.0]


def logistic(z):
    return 1 / (1 + math.exp(-z))


def evaluated(name, policy=POLICY, kl=0.0, **settings):
    logprobs = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    streams = {"reference_logprobs": REFERENCE, "desirable": GOOD}
    if "kl" in LOSSES[name].streams:
        streams["kl"] = [kl] * 3
    values, _ = LOSSES[name].function(
        logprobs, **{key: torch.tensor(value, dtype=torch.float64) for key, value in streams.items()}, **settings
    )
    values.sum().backward()
    return values.tolist(), logprobs.grad.tolist()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_kto_weighs_gains_and_losses_from_the_divergence_on(beta):
    kl, weights = 0.4, (1.5, 0.8)
    settings = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    values, gradient = evaluated("kto", beta=beta, kl=kl, **settings)
    ratios = [1.0, -0.5, -0.5]
    felt = [logistic(beta * (ratios[0] - kl)), logistic(beta * (ratios[1] - kl)), logistic(beta * (kl - ratios[2]))]
    scales = (weights[0], weights[0], weights[1])
    assert values == pytest.approx([w * (1 - v) for w, v in zip(scales, felt, strict=True)], abs=1e-9)
    slopes = [sign * beta * w * v * (1 - v) for sign, w, v in zip((-1, -1, 1), scales, felt, strict=True)]
    assert gradient == pytest.approx(slopes, abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_apo_zero_raises_good_answers_and_lowers_bad_ones_whatever_the_divergence(beta):
    values, gradient = evaluated("apo_zero_unpaired", beta=beta)
    held = [logistic(beta * 1.0), logistic(-beta * 0.5), logistic(-beta * 0.5)]
    assert values == pytest.approx([1 - held[0], 1 - held[1], held[2]], abs=1e-9)
    assert gradient == pytest.approx(
        [sign * beta * v * (1 - v) for sign, v in zip((-1, -1, 1), held, strict=True)], abs=1e-9
    )
    assert values == evaluated("kto", beta=beta)[0]


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_where_policy_and_reference_are_one_the_value_is_a_half(name):
    assert evaluated(name, REFERENCE)[0] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_hopeless_answers_give_finite_numbers(name):
    values, gradient = evaluated(name, [-5e4, 0.0, -5e4])
    assert all(map(math.isfinite, values + gradient))
