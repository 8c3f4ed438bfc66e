from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.draw import draw, uniforms
from tercet.types import SamplingParams

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def one(uniform, **settings):
    tokens, logprobs = draw(LOGITS, SamplingParams(max_tokens=1, **settings), torch.tensor([uniform]))
    return int(tokens[0]), math.exp(float(logprobs[0]))


@pytest.mark.parametrize(
    ("uniform", "token", "probability"),
    [
        (0.0, 0, 0.1),
        (0.099, 0, 0.1),
        (0.101, 1, 0.4),
        (0.499, 1, 0.4),
        (0.501, 2, 0.2),
        (0.701, 3, 0.3),
        (0.9999, 3, 0.3),
    ],
)
def test_a_uniform_number_picks_the_token_where_the_running_sum_passes_it(uniform, token, probability):
    assert one(uniform) == (token, pytest.approx(probability))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_p": 0.5}, {1: 4 / 7, 3: 3 / 7}),  # 0.4 is not enough: the token that passes 0.5 stays
        ({"top_p": 0.39}, {1: 1.0}),
        ({"min_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),  # 0.6 of 0.4 is 0.24
        ({"min_p": 0.4}, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        ({"top_k": 3, "min_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 9}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
    ],
)
def test_what_is_left_after_restricting_is_a_distribution(settings, kept):
    seen = dict(one(float(u), **settings) for u in np.linspace(0, 0.9999, 200))
    assert seen == {token: pytest.approx(p, rel=1e-4) for token, p in kept.items()}
    assert sum(seen.values()) == pytest.approx(1, rel=1e-4)


def test_temperature_divides_the_logits_before_anything_else():
    squared = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    squared /= squared.sum()
    seen = dict(one(float(u), temperature=0.5) for u in np.linspace(0, 0.9999, 200))
    assert [seen[i] for i in range(4)] == pytest.approx(squared.tolist(), rel=1e-4)


def test_greedy_gives_the_log_prob_of_temperature_one():
    assert one(0.0, temperature=0.0) == (1, pytest.approx(0.4))


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((1, 700), float("-inf"))
    logits[0, [513, 699]] = 0.0
    for uniform, token in ((0.0, 513), (0.49, 513), (0.51, 699), (1 - 2**-53, 699)):
        tokens, logprobs = draw(logits, SamplingParams(max_tokens=1), torch.tensor([uniform], dtype=torch.float64))
        assert (int(tokens[0]), float(logprobs[0])) == (token, pytest.approx(math.log(0.5)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_every_vocabulary_and_number_gives_a_token_with_its_own_log_prob(vocabulary, seed, uniform):
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed)) * 5
    tokens, logprobs = draw(logits, SamplingParams(max_tokens=1), torch.tensor([uniform, uniform]))
    expected = torch.log_softmax(logits.double(), -1).gather(-1, tokens[:, None])[:, 0]
    assert logprobs.double().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_bfloat16_logits_lose_nothing_in_the_softmax():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs = draw(logits, SamplingParams(max_tokens=1), torch.tensor([0.5]))
    assert float(logprobs[0]) == pytest.approx(float(torch.log_softmax(logits.double(), -1)[0, tokens[0]]), abs=1e-5)


def test_the_logits_are_left_as_they_were():
    logits = LOGITS.clone()
    draw(logits, SamplingParams(max_tokens=1, temperature=0.5, top_k=2), torch.tensor([0.5]))
    assert torch.equal(logits, LOGITS)


def test_uniform_numbers_are_uniform():
    numbers = np.concatenate([uniforms(0, p, s, 50) for p in range(20) for s in range(10)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.005)


@pytest.mark.parametrize("restriction", [{}, {"top_k": 5}, {"temperature": 0.0}])
def test_a_row_is_drawn_alike_among_many_and_alone(restriction):
    generator = torch.Generator().manual_seed(1)
    logits, uniform = torch.randn(50, 900, generator=generator), torch.rand(50, generator=generator)
    params = SamplingParams(max_tokens=1, **restriction)
    together = draw(logits, params, uniform)
    alone = [draw(logits[i : i + 1], params, uniform[i : i + 1]) for i in range(50)]
    assert together[0].tolist() == [int(tokens[0]) for tokens, _ in alone]
    assert together[1].tolist() == pytest.approx([float(logprobs[0]) for _, logprobs in alone], abs=1e-6)
