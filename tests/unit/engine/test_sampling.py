"""What every engine promises of its samples, tried on each of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tercet.engine.budgets import Budgets
from tercet.engine.draw import uniforms
from tercet.engine.fake import FakeEngine
from tercet.errors import EngineError
from tercet.types import AdamParams, Batch, Datum, SamplingParams

PROMPTS = [[3, 4, 5], [6], [3, 4, 7, 7, 5], [5, 5], [3, 4, 5, 6]]
EOS = 2


def tokens_of(groups):
    return [[completion.tokens for completion in group] for group in groups]


def test_a_completion_depends_on_its_prompts_place_and_its_number_alone(subject):
    sampler = subject.engine().sampler()
    params = SamplingParams(max_tokens=6, seed=11)
    together = sampler.sample(PROMPTS, params, 4).result()
    assert len({completion.tokens for completion in together[0]}) == 4
    assert tokens_of(sampler.sample(PROMPTS[:2], params, 4).result()) == tokens_of(together[:2])
    assert tokens_of(sampler.sample(PROMPTS, params, 2).result()) == tokens_of(group[:2] for group in together)
    other_neighbours = [PROMPTS[0], [7, 7, 7, 7], PROMPTS[2]]
    again = sampler.sample(other_neighbours, params, 4).result()
    assert tokens_of([again[0], again[2]]) == tokens_of([together[0], together[2]])


@pytest.mark.parametrize("max_rows", [1, 3, 7, 64])
def test_more_work_than_rows_gives_the_same_completions(subject, max_rows):
    params = SamplingParams(max_tokens=7, seed=2, stop=(6,))
    expected = subject.engine().sampler().sample(PROMPTS, params, 5).result()
    assert len({len(c.tokens) for group in expected for c in group}) > 1 or subject.name != "fake"
    found = subject.engine(max_rows=max_rows).sampler().sample(PROMPTS, params, 5).result()
    assert tokens_of(found) == tokens_of(expected)
    for group, expected_group in zip(found, expected, strict=True):
        for completion, other in zip(group, expected_group, strict=True):
            assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert completion.stop_reason == other.stop_reason


def test_other_seeds_give_other_completions(subject):
    sampler = subject.engine().sampler()
    one, other = (sampler.sample(PROMPTS, SamplingParams(max_tokens=6, seed=seed), 2).result() for seed in (1, 2))
    assert tokens_of(one) != tokens_of(other)


def test_the_numbers_that_drive_a_completion_do_not_depend_on_how_many_are_asked_for():
    assert uniforms(3, 1, 2, 5).tolist() == uniforms(3, 1, 2, 50)[:5].tolist()
    every = {tuple(uniforms(s, p, i, 2)) for s in range(4) for p in range(4) for i in range(4)}
    assert len(every) == 64


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.4])
def test_the_sampler_scores_its_own_completions_as_it_drew_them(subject, batch, temperature):
    trainer = subject.trainer(subject.engine())
    trainer.forward_backward(batch, "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    sampler = trainer.sampler()
    params = SamplingParams(max_tokens=6, temperature=temperature, seed=4)
    for prompt, group in zip(PROMPTS, sampler.sample(PROMPTS, params, 3).result(), strict=True):
        rows = [[*prompt, *completion.tokens] for completion in group]
        scored = sampler.logprobs(rows, [len(prompt)] * 3, temperature).result()
        for completion, row in zip(group, scored, strict=True):
            assert row == pytest.approx(completion.logprobs, abs=1e-5)


def test_temperature_zero_takes_the_likeliest_token_every_time(subject):
    sampler = subject.engine().sampler()
    group = sampler.sample([[3, 4]], SamplingParams(max_tokens=3, temperature=0.0), 2).result()[0]
    assert group[0].tokens == group[1].tokens
    vocabulary = 8 if subject.name == "fake" else 512
    drawn = [3, 4]
    for token, logprob in zip(group[0].tokens, group[0].logprobs, strict=True):
        every = [
            row[0]
            for row in sampler.logprobs([[*drawn, t] for t in range(vocabulary)], [len(drawn)] * vocabulary).result()
        ]
        assert token == int(np.argmax(every))
        assert logprob == pytest.approx(max(every), abs=1e-5)
        drawn.append(token)


def test_greedy_ties_take_the_first_token():
    sampler = FakeEngine(vocabulary=4).sampler()
    assert sampler.sample([[3]], SamplingParams(max_tokens=2, temperature=0.0)).result()[0][0].tokens == (0, 0)


@pytest.mark.parametrize("restriction", [{"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.4}, {"top_k": 4, "top_p": 0.8}])
def test_restricted_samples_have_the_log_probs_of_what_they_were_drawn_from(subject, restriction):
    sampler = subject.engine().sampler()
    params = SamplingParams(max_tokens=1, seed=1, temperature=0.8, **restriction)
    vocabulary = 8 if subject.name == "fake" else 512
    rows = [[3, 4, token] for token in range(vocabulary)]
    full = np.exp([row[0] for row in sampler.logprobs(rows, [2] * vocabulary, 0.8).result()])
    order = np.argsort(-full)
    keep = np.ones(vocabulary, dtype=bool)
    if "top_k" in restriction:
        keep[order[restriction["top_k"] :]] = False
    if "top_p" in restriction:
        before = np.concatenate([[0], np.cumsum(full[order])[:-1]])
        keep[order[before >= restriction["top_p"]]] = False
    if "min_p" in restriction:
        keep[full < restriction["min_p"] * full.max()] = False
    kept = full * keep / full[keep].sum()
    for completion in sampler.sample([[3, 4]], params, 60).result()[0]:
        assert keep[completion.tokens[0]]
        assert math.exp(completion.logprobs[0]) == pytest.approx(kept[completion.tokens[0]], rel=1e-4)


def test_a_stop_token_ends_the_sample_and_is_part_of_it(subject):
    sampler = subject.engine().sampler()
    free = sampler.sample([[3, 4]], SamplingParams(max_tokens=8, seed=5), 6).result()[0]
    stop = max(free, key=lambda completion: len(completion.tokens)).tokens[3]
    stopped = sampler.sample([[3, 4]], SamplingParams(max_tokens=8, seed=5, stop=(stop,)), 6).result()[0]
    for before, after in zip(free, stopped, strict=True):
        if stop in before.tokens:
            assert after.tokens == before.tokens[: before.tokens.index(stop) + 1]
            assert after.stop_reason == "stop"
        else:
            assert after == before


def test_a_stop_string_that_spans_tokens_ends_the_sample_with_the_token_that_completes_it(subject):
    engine = subject.engine()
    sampler = engine.sampler()
    free = sampler.sample([[3, 4]], SamplingParams(max_tokens=12, seed=5), 8).result()[0]
    spanning = [
        (before[-1] + after[0])
        for c in free
        for t in range(1, len(c.tokens) - 1)
        for before, after in [(engine.language.decode([c.tokens[t]]), engine.language.decode([c.tokens[t + 1]]))]
        if before.isascii() and after.isascii() and before and after
    ]
    assert spanning
    stop = spanning[len(spanning) // 2]
    params = SamplingParams(max_tokens=12, seed=5, stop=(stop,))
    stopped = sampler.sample([[3, 4]], params, 8).result()[0]
    assert any(completion.stop_reason == "stop" for completion in stopped)
    for before, after in zip(free, stopped, strict=True):
        texts = [engine.language.decode(list(before.tokens[:n])) for n in range(1, len(before.tokens) + 1)]
        ends = [n for n, text in enumerate(texts, start=1) if stop in text]
        if ends:
            assert (after.tokens, after.stop_reason) == (before.tokens[: ends[0]], "stop")
            assert engine.language.decode(list(after.tokens)).count(stop) == 1
        else:
            assert after == before


def test_a_stop_string_in_the_prompt_stops_nothing(subject):
    engine = subject.engine()
    stop = engine.language.decode([4, 5])
    completion = engine.sampler().sample([[4, 5]], SamplingParams(max_tokens=2, stop=(stop,))).result()[0][0]
    assert completion.stop_reason in ("length", "eos")


def test_the_end_of_text_token_ends_a_sample_and_is_part_of_it(subject):
    engine = subject.engine()
    trainer = subject.trainer(engine)
    batch = Batch([Datum([3, 4, 5, EOS], [0, 1, 1, 1])])
    for _ in range(60):
        trainer.forward_backward(batch, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.1 if subject.name == "fake" else 0.02)).result()
    sampler = trainer.sampler()
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    completion = sampler.sample([[3]], greedy).result()[0][0]
    assert (completion.tokens, completion.stop_reason) == ((4, 5, EOS), "eos")
    asked_for = SamplingParams(max_tokens=6, temperature=0.0, stop=(EOS,))
    assert sampler.sample([[3]], asked_for).result()[0][0].stop_reason == "stop"
    short = SamplingParams(max_tokens=2, temperature=0.0)
    assert sampler.sample([[3]], short).result()[0][0].stop_reason == "length"


def test_prompts_that_leave_no_room_or_are_empty_are_refused(subject):
    engine = subject.engine()
    sampler, limit = engine.sampler(), engine.context_tokens
    sampler.sample([[3] * (limit - 2)], SamplingParams(max_tokens=2)).result()
    with pytest.raises(EngineError, match=f"prompt 1 has {limit - 1} tokens"):
        sampler.sample([[3], [3] * (limit - 1)], SamplingParams(max_tokens=2)).result()
    with pytest.raises(EngineError, match="prompt 0 has 0 tokens"):
        sampler.sample([[]], SamplingParams(max_tokens=2)).result()
    assert sampler.sample([], SamplingParams(max_tokens=2)).result() == []


def test_scores_begin_where_they_are_asked_to(subject):
    sampler = subject.engine().sampler()
    rows = [[3, 4, 5, 6], [3, 4], [5]]
    whole = sampler.logprobs(rows).result()
    assert [len(row) for row in whole] == [3, 1, 0]
    part = sampler.logprobs(rows, [3, 0, 1]).result()
    assert part == [pytest.approx(whole[0][2:], abs=1e-6), pytest.approx(whole[1], abs=1e-6), []]
    with pytest.raises(EngineError, match="sequence 1 has 2 tokens; its log-probs cannot start at 5"):
        sampler.logprobs(rows, [1, 5, 1]).result()


def test_samples_follow_the_policy():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]))
    sampler = FakeEngine(vocabulary=3, logits=logits).sampler()
    group = sampler.sample([[0]], SamplingParams(max_tokens=2, seed=3), 4000).result()[0]
    first = np.bincount([c.tokens[0] for c in group], minlength=3) / 4000
    assert np.abs(first - [0.5, 0.3, 0.2]).max() < 0.03  # four standard errors
    after_one = [c.tokens[1] for c in group if c.tokens[0] == 1]
    second = np.bincount(after_one, minlength=3) / len(after_one)
    assert np.abs(second - [0.1, 0.1, 0.8]).max() < 0.05


def test_rows_that_finish_make_room_for_waiting_ones():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    engine = FakeEngine(vocabulary=2, logits=logits, eos=frozenset({1}), budgets=Budgets(max_rows=4))
    groups = engine.sampler().sample([[0]] * 9, SamplingParams(max_tokens=20), 6).result()
    assert [len(group) for group in groups] == [6] * 9
    for completion in (c for group in groups for c in group):
        assert completion.stop_reason == ("eos" if completion.tokens[-1] == 1 else "length")
        assert 1 not in completion.tokens[:-1]
        assert completion.logprobs == pytest.approx([math.log(0.5)] * len(completion.tokens))
