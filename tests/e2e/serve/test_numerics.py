"""What the cookbook's conformance scripts look at, through the SDK.

Log-probs under a temperature, and whether sampler and trainer are one model.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from tests.e2e.serve.serving import ADAM, data, datum, learned, logprobs_of, types

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = [40, 41, 42, 43]
VOCABULARY = 512


def whole_distributions(sampler: Any, tokens: list[int]) -> list[dict[int, float]]:
    """For every token but the first: the log-probs of all tokens that could stand there, at temperature 1."""
    one = types.SamplingParams(max_tokens=1, seed=0)
    found = sampler.sample(
        prompt=types.ModelInput.from_ints(tokens), num_samples=1, sampling_params=one,
        include_prompt_logprobs=True, topk_prompt_logprobs=VOCABULARY,
    ).result()  # fmt: skip
    return [dict(place) for place in found.topk_prompt_logprobs[1:]]


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 1.6])
def test_sampled_log_probs_are_those_of_the_tempered_distribution(client: Any, temperature: float):
    sampler = learned(client).save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=6, temperature=temperature, seed=11, stop=[])
    asked = sampler.sample(prompt=types.ModelInput.from_ints(PROMPT), num_samples=3, sampling_params=params)
    for sequence in asked.result().sequences:
        tokens = [*PROMPT, *sequence.tokens]
        at_1 = whole_distributions(sampler, tokens)
        raw = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
        for t in range(len(PROMPT), len(tokens)):
            here = at_1[t - 1]
            assert len(here) == VOCABULARY
            total = math.log(math.fsum(math.exp(p / temperature) for p in here.values()))
            tempered = here[tokens[t]] / temperature - total
            assert sequence.logprobs[t - len(PROMPT)] == pytest.approx(tempered, abs=2e-5)
            assert raw[t] == pytest.approx(here[tokens[t]], abs=1e-5)  # of a prompt, always at temperature 1


def test_samples_follow_the_tempered_distribution(client: Any):
    sampler = client.create_sampling_client(base_model="tiny").result()
    params = types.SamplingParams(max_tokens=1, temperature=0.25, seed=3, stop=[])
    prompt = types.ModelInput.from_ints(PROMPT)
    drawn = [each.tokens[0] for each in sampler.sample(prompt, 400, params).result().sequences]
    [*_, here] = whole_distributions(sampler, [*PROMPT, 0])
    weights = {token: math.exp(p / 0.25) for token, p in here.items()}
    likely = sorted(weights, key=lambda token: -weights[token])[:50]
    share = sum(weights[token] for token in likely) / sum(weights.values())
    # Of 400 draws the share of a set lies within four standard errors of its probability.
    error = math.sqrt(share * (1 - share) / 400)
    assert sum(token in likely for token in drawn) / 400 == pytest.approx(share, abs=4 * error)


def test_sampler_and_trainer_are_one_model_before_and_after_learning(client: Any):
    model = learned(client, steps=1)
    params = types.SamplingParams(max_tokens=12, seed=5, stop=[])
    for _ in range(3):
        sampler = model.save_weights_and_get_sampling_client().result()
        drawn = sampler.sample(types.ModelInput.from_ints(PROMPT), 4, params).result().sequences
        rows, gaps = [], []
        for each in drawn:
            q = [0.0] * (len(PROMPT) - 1) + list(each.logprobs)
            advantages = [0.0] * (len(PROMPT) - 1) + [0.5] * len(each.tokens)
            rows.append(datum([*PROMPT, *each.tokens], logprobs=q, advantages=advantages))
        found = model.forward_backward(rows, "importance_sampling").result()
        for each, p in zip(drawn, logprobs_of(found), strict=True):
            gaps += [old - new for old, new in zip(each.logprobs, p[len(PROMPT) - 1 :], strict=True)]
        # `optim/kl_sample_train_v1` and `_v2` of the cookbook: mean, and half the mean square, of the difference.
        assert abs(statistics.fmean(gaps)) < 1e-6
        assert 0.5 * statistics.fmean(gap**2 for gap in gaps) < 1e-11
        # The ratio is 1 everywhere, so the loss is minus the sum of the advantages.
        assert found.metrics["loss:sum"] == pytest.approx(-0.5 * len(gaps), abs=1e-3)
        model.forward_backward(data(), "cross_entropy").result()
        model.optim_step(types.AdamParams(**ADAM)).result()
