"""The fake is a policy one can work out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tercet.engine.base import Engine, Sampler, Trainer
from tercet.engine.budgets import Budgets
from tercet.engine.fake import FakeEngine
from tercet.errors import CheckpointError, EngineError
from tercet.types import AdamParams, Batch, Datum, SamplingParams


def test_the_fake_is_an_engine():
    engine: Engine = FakeEngine(vocabulary=2)
    trainer: Trainer = engine.trainer(seed=3)
    sampler: Sampler = engine.sampler()
    assert trainer.context_tokens == engine.context_tokens == 64
    assert sampler.fingerprint() == trainer.fingerprint()


def test_a_row_of_the_table_is_the_distribution_after_its_token():
    probabilities = torch.tensor([[0.9, 0.1], [0.25, 0.75]])
    sampler = FakeEngine(vocabulary=2, logits=probabilities.log()).sampler()
    row = sampler.logprobs([[0, 1, 1, 0, 0]]).result()[0]
    assert [math.exp(p) for p in row] == pytest.approx([0.1, 0.75, 0.25, 0.9], rel=1e-5)


@pytest.mark.parametrize("context_tokens", [16, 1024])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_longer_contexts_are_looked_up_right_in_every_layout(order, context_tokens):
    vocabulary = 3
    rows = vocabulary * (vocabulary + 1) ** (order - 1)
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(order))
    engine = FakeEngine(
        vocabulary=vocabulary, order=order, logits=logits, context_tokens=context_tokens, budgets=Budgets(max_rows=3)
    )
    table = torch.log_softmax(logits, -1).tolist()

    def expected(tokens, t):
        index = 0
        for back in range(1, order + 1):  # the newest token counts most
            index = index * (vocabulary + 1) + (tokens[t - back] if t >= back else vocabulary)
        return table[index][tokens[t]]

    sampler = engine.sampler()
    prompts = [[0], [0, 1, 2], [0, 1, 1, 2, 0], [2, 2]]
    for prompt, group in zip(prompts, sampler.sample(prompts, SamplingParams(max_tokens=9), 3).result(), strict=True):
        for completion in group:
            tokens = [*prompt, *completion.tokens]
            scores = [expected(tokens, t) for t in range(len(prompt), len(tokens))]
            assert completion.logprobs == pytest.approx(scores, abs=1e-5)
    long = [[t % 3 for t in range(i, i + context_tokens)] for i in range(3)]
    for tokens, row in zip(long, sampler.logprobs(long).result(), strict=True):
        assert row == pytest.approx([expected(tokens, t) for t in range(1, len(tokens))], abs=1e-5)


def test_the_gradient_is_what_one_works_out_by_hand():
    trainer = FakeEngine(vocabulary=2).trainer()
    trainer.forward_backward(Batch([Datum([0, 1, 1], [0.0, 1.0, 3.0])]), "cross_entropy").result()
    # After 0 comes 1 (weight 1/4), after 1 comes 1 (weight 3/4); softmax minus one-hot at even logits is 1/2.
    assert trainer.table.logits.grad.tolist() == [[0.125, -0.125], [0.375, -0.375]]


def test_a_table_of_another_shape_is_refused(tmp_path):
    with pytest.raises(EngineError, match=r"order=2 and vocabulary=3 need \(12, 3\)"):
        FakeEngine(vocabulary=3, order=2, logits=torch.zeros(3, 3))
    weights = FakeEngine(vocabulary=2).trainer().save(tmp_path / "two").result()
    with pytest.raises(CheckpointError, match=r"another shape, \(2, 2\)"):
        FakeEngine(vocabulary=3).trainer().load(weights).result()


def test_cross_entropy_converges_to_the_empirical_frequencies_of_pairs():
    generator = torch.Generator().manual_seed(0)
    text = torch.multinomial(torch.tensor([0.5, 0.3, 0.15, 0.05]), 400, replacement=True, generator=generator).tolist()
    rows = [text[at : at + 20] for at in range(0, 400, 20)]
    counts = torch.zeros(4, 4)
    for row in rows:
        for a, b in itertools.pairwise(row):
            counts[a, b] += 1
    frequencies = counts / counts.sum(1, keepdim=True)
    trainer = FakeEngine(vocabulary=4).trainer()
    batch = Batch([Datum(row, [0.0, *[1.0] * 19]) for row in rows])
    for step in range(150):
        trainer.forward_backward(batch, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.3 * (1 - step / 150))).result()
    learned = torch.softmax(trainer.table.logits.detach(), -1)
    assert 0.5 * (learned - frequencies).abs().sum(1).max() < 0.01
