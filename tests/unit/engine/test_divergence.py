from __future__ import annotations

import math

import pytest
import torch

from tercet.engine.divergence import divergences
from tercet.engine.fake import FakeEngine, Table
from tercet.engine.local import LocalEngine
from tercet.engine.outputs import Body
from tercet.errors import EngineError
from tercet.models.load import load_model
from tercet.types import LoraConfig


def of_table(*rows):
    engine = FakeEngine(vocabulary=len(rows), logits=torch.tensor(rows).log())
    return engine, engine.sampler()


def test_it_is_the_mean_log_ratio_over_the_whole_vocabulary():
    _, p = of_table([0.5, 0.5], [0.25, 0.75])
    _, q = of_table([0.25, 0.75], [0.25, 0.75])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert p.divergences(q, [[0, 0, 1], [1, 0]], [1, 1]).result() == [
        pytest.approx([first, first], abs=1e-6), pytest.approx([0.0], abs=1e-6),
    ]  # fmt: skip
    assert p.divergences(q, [[0, 0, 1]], [2]).result() == [pytest.approx([first], abs=1e-6)]


def test_a_token_that_never_comes_costs_nothing_even_where_both_exclude_it():
    head = torch.nn.Linear(3, 3).requires_grad_(False)
    head.weight.copy_(torch.eye(3))
    head.bias.copy_(torch.tensor([0.0, 0.0, -torch.inf]))
    p, q = (
        Body(Table(torch.tensor([row] * 3), 1, 64).requires_grad_(False), head, torch.device("cpu"), 64)
        for row in ([0.0, 0.0, 5.0], [math.log(3), 0.0, 7.0])
    )
    found = divergences(lambda: p, lambda: q, [[0, 1]], [1], temperature=1.0, max_tokens=64)
    assert found == [pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)], abs=1e-6)]


def test_two_adapters_that_take_turns_in_one_memory_are_both_seen():
    engine = LocalEngine(load_model("tiny"), score_tokens=8)
    trainer = engine.trainer(lora=LoraConfig(rank=4))
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.3)
    rows, starts = [[5, 9, 11, 7, 8], [5, 9, 4], [30, 31]], [2, 1, 1]
    ours, theirs = trainer.sampler(), engine.sampler()
    found = ours.divergences(theirs, rows, starts, 0.8).result()
    assert [len(row) for row in found] == [3, 2, 1]
    # The same, from the log-probs of every token of the vocabulary.
    tokens = range(engine.model.config.vocab_size)
    p, q = (
        torch.tensor(each.logprobs([[30, t] for t in tokens], None, 0.8).result())[:, 0].double()
        for each in (ours, theirs)
    )
    assert found[2][0] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5) and found[2][0] > 0.01
    assert ours.divergences(ours, rows, starts).result() == [[0.0] * 3, [0.0] * 2, [0.0]]


def test_a_sampler_that_is_elsewhere_is_refused():
    _, p = of_table([0.5, 0.5], [0.5, 0.5])
    with pytest.raises(EngineError, match="both in the memory of one engine"):
        p.divergences(object(), [[0, 1]], [1]).result()
