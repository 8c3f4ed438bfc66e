"""Against numbers worked out by hand, and gradients against the formulas'."""

from __future__ import annotations

import math

import pytest
import torch

from tercet.losses import LOSSES
from tercet.losses.policy_gradient import ppo_loss
from tercet.losses.ppo_critic import clipped_value_loss, entropy_bonus, ppo_critic_loss


def numbers(*values, grad=False):
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def close(values):
    return pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope", "cut"),
    [
        (1.0, 1.0, 2.0, 0.5, -1.0, 0),
        (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # inside the range
        (1.5, 1.0, 2.0, 0.32, 0.0, 1),  # left the range towards the target: kept at 1.2, and no slope
        (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # left it the other way: its own error is larger than that at 0.8
        (3.0, 1.0, 2.0, 0.5, 1.0, 0),  # beyond the target: errors 1 and 0.64
    ],
)
def test_the_critic_pays_for_the_larger_of_its_error_and_the_one_near_its_old_value(
    value, old, target, loss, slope, cut
):
    values = numbers(value, grad=True)
    found, metrics = clipped_value_loss(values, old_values=numbers(old), returns=numbers(target), clip_range_value=0.2)
    found.sum().backward()
    assert (found.tolist()[0], values.grad.tolist()[0]) == (close([loss]), close([slope]))
    assert metrics["value_clip_ratio"].tolist() == [[cut]]
    assert metrics["value_error"].tolist()[0] == close([(value - target) ** 2])


def test_policy_and_critic_on_one_trunk_are_added_by_their_weight():
    logprobs, values = numbers(math.log(0.75), grad=True), numbers(1.0, grad=True)
    loss, metrics = ppo_critic_loss(
        logprobs, values, sampling_logprobs=numbers(math.log(0.5)), advantages=numbers(2.0), old_values=numbers(1.0),
        returns=numbers(2.0), vf_coef=0.1,
    )  # fmt: skip
    loss.sum().backward()
    assert loss.tolist()[0] == close([-2.4 + 0.1 * 0.5])
    assert (metrics["policy_loss"].tolist()[0], metrics["value_loss"].tolist()[0]) == (close([-2.4]), close([0.5]))
    assert metrics["clip_ratio"].tolist() == [[1.0]]
    assert (logprobs.grad.tolist()[0], values.grad.tolist()[0]) == (close([0.0]), close([-0.1]))


def test_the_policys_part_is_that_of_ppo_and_does_not_reach_the_critic():
    streams = {"sampling_logprobs": numbers(-1.0, -0.5), "advantages": numbers(1.0, -2.0)}
    logprobs, values = numbers(-0.9, -0.7), numbers(3.0, 4.0, grad=True)
    alone, _ = ppo_loss(logprobs, **streams)
    both, _ = ppo_critic_loss(logprobs, values, **streams, old_values=values.detach(), returns=values.detach())
    both.sum().backward()
    assert both.tolist()[0] == close(alone.tolist()[0])
    assert values.grad.tolist() == [[0.0, 0.0]]


def test_the_entropy_bonus_is_minus_the_entropy():
    entropies = numbers(1.5, 0.5, grad=True)
    loss, metrics = entropy_bonus(entropies, coef=0.1)
    loss.sum().backward()
    assert (loss.tolist()[0], entropies.grad.tolist()[0], metrics) == (close([-0.15, -0.05]), close([-0.1, -0.1]), {})


D = math.log(2)


@pytest.mark.parametrize(("name", "value", "slope"), [
    ("kl_term", D, 1.0), ("abs_kl_term", D, 1.0), ("mse_kl_term", D * D / 2, D), ("k3_term", D - 0.5, 0.5),
])  # fmt: skip
def test_each_term_of_the_kl_has_its_value_and_slope(name, value, slope):
    logprobs = numbers(math.log(0.5), grad=True)
    loss, metrics = LOSSES[name].function(logprobs, reference_logprobs=numbers(math.log(0.25)), coef=3.0)
    loss.sum().backward()
    assert (loss.tolist()[0], logprobs.grad.tolist()[0]) == (close([3 * value]), close([3 * slope]))
    assert metrics["kl_term"].tolist()[0] == close([value])


def expected_gradient(name, logits, reference):
    """Of the term's mean over the policy's own tokens, with respect to its logits."""
    logprobs = torch.log_softmax(logits, -1)
    values, _ = LOSSES[name].function(logprobs[None], reference_logprobs=reference.log()[None])
    return torch.autograd.grad((values[0] * logprobs.exp().detach()).sum(), logits, retain_graph=True)[0]


def test_what_each_term_of_the_kl_pulls_towards():
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    p = torch.softmax(logits, -1)
    (to_reference,) = torch.autograd.grad((p * (p / reference).log()).sum(), logits, retain_graph=True)
    (from_reference,) = torch.autograd.grad((reference * (reference / p).log()).sum(), logits, retain_graph=True)
    for name, expected in (
        ("kl_term", torch.zeros(3, dtype=torch.float64)), ("mse_kl_term", to_reference), ("k3_term", from_reference),
    ):  # fmt: skip
        torch.testing.assert_close(expected_gradient(name, logits, reference), expected, rtol=0, atol=1e-9)


def test_one_wild_ratio_of_k3_stays_finite():
    logprobs = numbers(-1000.0, grad=True)
    loss, _ = LOSSES["k3_term"].function(logprobs, reference_logprobs=numbers(-1.0))
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()
