from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tercet.models.logprobs import CHUNK_TOKENS, token_logprobs


def head_of(weight, bias=None, *, frozen=True):
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    head.weight.data = weight.clone()
    if bias is not None:
        head.bias.data = bias.clone()
    return head.requires_grad_(not frozen)


def example(n, dtype=torch.float64, vocabulary=11, width=5):
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(vocabulary, (n,), generator=generator)


def test_log_probs_and_entropy_of_a_distribution_known_by_heart():
    head = head_of(torch.tensor([[0.5], [0.25], [0.25]], dtype=torch.float64).log())
    logprobs, entropy = token_logprobs(torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 1, 2]), head)
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.25, 0.25], abs=1e-12)
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 3, abs=1e-12)


@pytest.mark.parametrize("n", [0, 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 7])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_heads_gradient_is_plain_autograds(n, temperature, with_bias):
    hidden, weight, bias, targets = example(n)
    head = head_of(weight, bias if with_bias else None)
    ours, theirs = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    logprobs, entropy = token_logprobs(ours, targets, head, temperature)
    logits = nn.functional.linear(theirs, weight, bias if with_bias else None) / temperature
    full = torch.log_softmax(logits, -1)
    expected = full.gather(-1, targets[:, None])[:, 0]
    coefficients = torch.arange(1.0, n + 1, dtype=torch.float64)
    (logprobs * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(entropy.double(), -(full.exp() * full).sum(-1), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)
    assert not entropy.requires_grad


@pytest.mark.parametrize("n", [3, 2 * CHUNK_TOKENS + 7])
def test_a_learned_heads_gradient_is_plain_autograds(n):
    hidden, weight, bias, targets = example(n)
    ours, theirs = head_of(weight, bias, frozen=False), head_of(weight, bias, frozen=False)
    logprobs, entropy = token_logprobs(hidden, targets, ours, 0.7)
    torch.log_softmax(theirs(hidden) / 0.7, -1).gather(-1, targets[:, None]).sum().backward()
    logprobs.sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=0, atol=1e-9)
    assert not entropy.requires_grad


def test_with_and_without_gradient_the_numbers_are_the_same():
    hidden, weight, bias, targets = example(300)
    with torch.no_grad():
        plain = token_logprobs(hidden, targets, head_of(weight, bias))
    learned = token_logprobs(hidden, targets, head_of(weight, bias, frozen=False))
    frozen = token_logprobs(hidden.clone().requires_grad_(True), targets, head_of(weight, bias))
    for a, b, c in zip(plain, learned, frozen, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(a, c.detach(), rtol=0, atol=1e-12)


def test_the_logits_are_divided_by_the_temperature_not_the_log_probs():
    hidden, weight, _, _ = example(1)
    every = torch.arange(11)
    logprobs, entropy = token_logprobs(hidden.expand(11, -1), every, head_of(weight), 0.6)
    assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-12)
    expected = torch.softmax(weight @ hidden[0] / 0.6, -1)
    assert logprobs.exp().tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert float(entropy[0]) == pytest.approx(-float((expected * expected.log()).sum()), abs=1e-12)


def test_temperature_zero_means_the_log_probs_of_temperature_one():
    hidden, weight, _, targets = example(4)
    for a, b in zip(
        token_logprobs(hidden, targets, head_of(weight), 0.0),
        token_logprobs(hidden, targets, head_of(weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_bfloat16_head_multiplies_in_float32():
    hidden, weight, _, targets = example(1000, torch.bfloat16, vocabulary=2000)
    head = head_of(weight)
    logprobs, entropy = token_logprobs(hidden, targets, head)
    logits = hidden.double() @ head.weight.double().T  # no logit is rounded to bfloat16
    expected = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-4)
    assert abs(float(logprobs.double().sum() - expected.sum())) < 0.01


def test_huge_logits_stay_finite():
    head = head_of(torch.tensor([[1000.0], [-1000.0]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.tensor([0, 1]), head)
    assert logprobs.tolist() == [0.0, -2000.0]
    assert entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert hidden.grad.isfinite().all()


def test_hidden_states_and_head_are_left_as_they_were():
    hidden, weight, _, targets = example(5)
    before, head = hidden.clone(), head_of(weight)
    token_logprobs(hidden.requires_grad_(True), targets, head, 0.5)
    assert torch.equal(hidden.detach(), before) and torch.equal(head.weight, weight)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("n", [1, CHUNK_TOKENS + 7])
def test_an_entropy_that_is_learned_from_has_plain_autograds_gradient(n, frozen):
    hidden, weight, bias, targets = example(n)
    ours, theirs = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    head = head_of(weight, bias, frozen=frozen)
    logprobs, entropy = token_logprobs(ours, targets, head, 0.7, entropy_gradient=True)
    full = torch.log_softmax(nn.functional.linear(theirs, weight, bias) / 0.7, -1)
    coefficients = torch.arange(1.0, n + 1, dtype=torch.float64)
    (entropy * coefficients + logprobs).sum().backward()
    (-(full.exp() * full).sum(-1) * coefficients + full.gather(-1, targets[:, None])[:, 0]).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)
