"""What a server asks of every engine beside the four verbs: seeds, likeliest tokens, no end of text, room again."""

from __future__ import annotations

import gc
import math
import weakref

import pytest

from tercet.errors import EngineError
from tercet.types import AdamParams, SamplingParams

PROMPTS = [[3, 4, 5], [6], [3, 4, 7, 7, 5]]


def test_with_seeds_every_prompt_is_drawn_as_if_it_were_alone(subject):
    sampler = subject.engine().sampler()
    together = sampler.sample(PROMPTS, SamplingParams(max_tokens=6), 3, seeds=[11, 12, 13]).result()
    alone = [
        sampler.sample([prompt], SamplingParams(max_tokens=6, seed=seed), 3).result()[0]
        for prompt, seed in zip(PROMPTS, (11, 12, 13), strict=True)
    ]
    assert [[each.tokens for each in group] for group in together] == [[each.tokens for each in row] for row in alone]


def test_the_likeliest_tokens_hold_the_log_probs_that_scoring_gives(subject):
    sampler = subject.engine().sampler()
    rows = [[3, 4, 5, 6], [6, 7], [5]]
    every = sampler.top_logprobs(rows, 100_000, temperature=0.7).result()
    assert [len(row) for row in every] == [3, 1, 0]
    scored = sampler.logprobs(rows, temperature=0.7).result()
    for tokens, places, logprobs in zip(rows, every, scored, strict=True):
        for token, place, logprob in zip(tokens[1:], places, logprobs, strict=True):
            assert dict(place)[token] == pytest.approx(logprob, abs=1e-5)
            assert [each for _, each in place] == sorted((each for _, each in place), reverse=True)
            assert sum(math.exp(each) for _, each in place) == pytest.approx(1, abs=1e-5)
    [few] = sampler.top_logprobs(rows[:1], 2, [3], temperature=0.7).result()
    assert [token for token, _ in few[0]] == [token for token, _ in every[0][2][:2]]
    with pytest.raises(EngineError, match="sequence 1 has a token that the model does not know"):
        sampler.top_logprobs([[3], [3, 100_000]], 2).result()


def test_a_sample_can_go_on_past_the_end_of_text(subject):
    engine = subject.engine()
    [ended] = engine.sampler().sample([[5]], SamplingParams(max_tokens=40, temperature=3), 8).result()
    [whole] = engine.sampler().sample([[5]], SamplingParams(max_tokens=40, temperature=3, eos=False), 8).result()
    assert {len(each.tokens) for each in whole} == {40}
    assert [each.tokens for each in ended] == [b.tokens[: len(a.tokens)] for a, b in zip(ended, whole, strict=True)]


def test_a_closed_trainer_gives_its_memory_back_and_leaves_the_others_alone(subject, batch):
    engine = subject.engine()
    kept, closed = subject.trainer(engine, seed=1), subject.trainer(engine, seed=2)
    for trainer in (kept, closed):
        trainer.forward_backward(batch, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    before = kept.forward(batch).result().logprobs
    watched = [weakref.ref(parameter) for parameter in closed.parameters.values()]
    closed.close()
    del closed, trainer
    gc.collect()
    assert [ref() is None for ref in watched] == [True] * len(watched)
    assert kept.forward(batch).result().logprobs == before
    kept.close()
    again = subject.trainer(engine, seed=1)
    again.forward_backward(batch, "cross_entropy").result()
    again.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert again.forward(batch).result().logprobs == before
