from __future__ import annotations

import math

import pytest

from tercet.algorithms.kl_control import ESTIMATORS, adapted_kl_coef


def close(values):
    return pytest.approx(values, abs=1e-9)


def test_each_estimator_charges_what_its_formula_says():
    d = math.log(2)  # the policy finds the token twice as likely
    assert {name: estimate(d) for name, estimate in ESTIMATORS.items()} == {
        "kl": close(d), "abs": close(d), "mse": close(d * d / 2), "k3": close(0.5 - 1 + d),
    }  # fmt: skip
    assert {name: estimate(-d) for name, estimate in ESTIMATORS.items()} == {
        "kl": close(-d), "abs": close(d), "mse": close(d * d / 2), "k3": close(2 - 1 - d),
    }  # fmt: skip


def test_kl_and_k3_are_unbiased_and_mse_is_not():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    ratios = [math.log(a / b) for a, b in zip(p, q, strict=True)]
    divergence = sum(a * d for a, d in zip(p, ratios, strict=True))
    means = {name: sum(a * f(d) for a, d in zip(p, ratios, strict=True)) for name, f in ESTIMATORS.items()}
    assert means["kl"] == means["k3"] == close(divergence) == close(0.25 * math.log(2))
    assert means["mse"] == close(0.75 * math.log(2) ** 2 / 2)
    assert means["abs"] == close(0.75 * math.log(2))


def test_k3_of_a_token_the_policy_gave_up_stays_finite():
    assert math.isfinite(ESTIMATORS["k3"](-1000.0))


def test_the_coefficient_follows_the_kl_of_whole_answers_in_steps_of_the_batch():
    change = {"target": 6.0, "horizon": 10_000}
    assert adapted_kl_coef(0.2, 0.0, 4, **change) == close(0.199984)  # error cut at -0.2
    assert adapted_kl_coef(0.2, 60.0, 4, **change) == close(0.200016)  # and at 0.2
    assert adapted_kl_coef(0.2, 6.6, 100, **change) == close(0.2 * (1 + 0.1 * 100 / 10_000))
    assert adapted_kl_coef(0.2, 6.0, 4, **change) == 0.2
    assert adapted_kl_coef(0.2, -3.0, 4, **change) == close(0.199984)
