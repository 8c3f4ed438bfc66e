"""Every loss in float64 against numbers worked out by hand, and its gradient against the formula's."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from tercet.losses import LOSSES
from tercet.losses.likelihood import cross_entropy_loss
from tercet.losses.policy_gradient import cispo_loss, importance_sampling_loss, ppo_loss

POLICY = {"importance_sampling": importance_sampling_loss, "ppo": ppo_loss, "cispo": cispo_loss}


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log().requires_grad_(True)


def numbers(*values):
    return torch.tensor([values], dtype=torch.float64)


def evaluated(loss, new, old, advantages, **settings):
    """Values, gradients of their sum, and metrics, as lists."""
    logprobs = logs(*new)
    values, metrics = loss(logprobs, sampling_logprobs=logs(*old).detach(), advantages=numbers(*advantages), **settings)
    values.sum().backward()
    return values.tolist()[0], logprobs.grad.tolist()[0], {name: each.tolist()[0] for name, each in metrics.items()}


def close(values):
    return pytest.approx(values, abs=1e-9)


def test_cross_entropy_is_minus_the_log_prob():
    logprobs = logs(0.5, 0.25)
    values, metrics = cross_entropy_loss(logprobs)
    values.sum().backward()
    assert values.tolist()[0] == close([math.log(2), 2 * math.log(2)])
    assert logprobs.grad.tolist() == [[-1.0, -1.0]]
    assert metrics == {}


def test_importance_sampling_weighs_the_advantage_with_the_ratio():
    values, gradient, metrics = evaluated(importance_sampling_loss, (0.9, 0.3, 0.5), (0.6, 0.6, 0.5), (2, -1, 3))
    assert values == close([-3.0, 0.5, -3.0])
    assert gradient == close([-3.0, 0.5, -3.0])  # d(ratio)/d(logprob) is the ratio
    assert metrics["ratio"] == close([1.5, 0.5, 1.0])


@pytest.mark.parametrize(
    ("new", "advantage", "value", "slope", "cut"),
    [
        (0.5, 2, -2.0, -2.0, 0),  # ratio 1
        (0.55, 2, -2.2, -2.2, 0),  # ratio 1.1, inside
        (0.75, 2, -2.4, 0.0, 1),  # ratio 1.5 of a good token: cut at 1.2
        (0.25, 2, -1.0, -1.0, 0),  # ratio 0.5 of a good token: the plain one is smaller
        (0.75, -2, 3.0, 3.0, 0),  # ratio 1.5 of a bad token: not cut
        (0.25, -2, 1.6, 0.0, 1),  # ratio 0.5 of a bad token: cut at 0.8
        (0.75, 0, 0.0, 0.0, 0),
    ],
)
def test_ppo_takes_the_smaller_of_the_plain_and_the_clipped_objective(new, advantage, value, slope, cut):
    values, gradient, metrics = evaluated(ppo_loss, (new,), (0.5,), (advantage,))
    assert (values, gradient, metrics["clip_ratio"]) == (close([value]), close([slope]), [cut])


def test_ppos_two_bounds_are_set_apart():
    values, _, _ = evaluated(ppo_loss, (0.75, 0.25), (0.5, 0.5), (1, -1), clip_low=0.1, clip_high=0.3)
    assert values == close([-1.3, 0.9])


def test_cispo_bounds_the_weight_and_drops_no_token():
    values, gradient, metrics = evaluated(cispo_loss, (0.9, 0.9, 0.01), (0.6, 0.1, 0.5), (2, 2, -1))
    assert values == close([-1.5 * math.log(0.9) * 2, -4 * math.log(0.9) * 2, 0.02 * math.log(0.01)])
    assert gradient == close([-3.0, -8.0, 0.02])  # weight times advantage, with no gradient of the weight
    assert metrics["clip_ratio"] == [0, 1, 0]


def test_cispos_bounds_can_be_set():
    _, gradient, metrics = evaluated(cispo_loss, (0.9, 0.1), (0.6, 0.5), (1, 1), ratio_min=0.5, ratio_max=1.2)
    assert gradient == close([-1.2, -0.5])
    assert metrics["clip_ratio"] == [1, 1]


@pytest.mark.parametrize("loss", POLICY.values(), ids=POLICY)
def test_on_the_samplers_own_policy_every_gradient_is_reinforces(loss):
    _, gradient, metrics = evaluated(loss, (0.2, 0.7, 0.1), (0.2, 0.7, 0.1), (1.5, -2.0, 0.0))
    assert gradient == close([-1.5, 2.0, 0.0])
    assert metrics["ratio"] == close([1.0] * 3)
    assert metrics.get("clip_ratio", [0, 0, 0]) == [0, 0, 0]


@pytest.mark.parametrize("loss", POLICY.values(), ids=POLICY)
def test_the_expected_gradient_is_that_of_the_expected_reward(loss):
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    probabilities = torch.softmax(logits, -1)
    (expected,) = torch.autograd.grad((probabilities * rewards).sum(), logits)
    logprobs = torch.log_softmax(logits, -1)[None]
    values, _ = loss(logprobs, sampling_logprobs=logprobs.detach(), advantages=rewards[None])
    (ours,) = torch.autograd.grad((values[0] * probabilities.detach()).sum(), logits)
    torch.testing.assert_close(ours, -expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", POLICY.values(), ids=POLICY)
@pytest.mark.parametrize("gap", [30.0, 1000.0, -1000.0])
def test_one_wild_ratio_stays_finite(loss, gap):
    logprobs = numbers(-1.0, -1.0).requires_grad_(True)
    values, metrics = loss(logprobs, sampling_logprobs=numbers(-1.0, -1.0 - gap), advantages=numbers(1.0, -1.0))
    values.sum().backward()
    assert values.isfinite().all() and logprobs.grad.isfinite().all() and metrics["ratio"].isfinite().all()
    assert float(logprobs.grad[0, 0]) == close(-1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_one_value_where_the_table_says_and_metrics_without_gradient(name):
    loss = LOSSES[name]
    shape = (2, 3) if loss.per == "token" else (4,)

    def draw() -> torch.Tensor:
        return -torch.rand(shape, dtype=torch.float64)

    inputs = [draw().requires_grad_(each != "lengths") for each in loss.inputs]
    streams = {stream: draw() for stream in loss.streams}
    if loss.per == "pair":
        streams |= {"chosen": torch.tensor([0, 2]), "rejected": torch.tensor([1, 3])}
        streams |= {stream: torch.rand(2, dtype=torch.float64) for stream in loss.pair_streams}
    values, metrics = loss.function(*inputs, **streams)
    assert values.shape == ((2,) if loss.per == "pair" else shape) and values.requires_grad
    assert all(metric.shape == values.shape and not metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_names_everything_the_function_needs(name):
    loss = LOSSES[name]
    parameters = list(inspect.signature(loss.function).parameters.values())
    assert [p.name for p in parameters[: len(loss.inputs)]] == list(loss.inputs)
    given = {*loss.streams, *loss.pair_streams, *(("chosen", "rejected") if loss.per == "pair" else ())}
    needed = {p.name for p in parameters[len(loss.inputs) :] if p.default is inspect.Parameter.empty}
    assert needed <= given <= {p.name for p in parameters}
