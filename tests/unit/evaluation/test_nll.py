from __future__ import annotations

import math

import pytest
import torch

from tercet.engine.fake import FakeEngine
from tercet.evaluation.nll import held_out, nll
from tercet.types import Datum


def test_a_uniform_model_of_four_letters_costs_two_bits_a_byte():
    engine = FakeEngine(vocabulary=4)
    text = held_out([Datum([0, 1, 2, 3], [0, 1, 1, 1]), Datum([2, 2], [0, 1])], engine.language.decode)
    assert text.text_bytes == 4
    assert nll(engine.trainer(), text) == {"test/nll": pytest.approx(math.log(4)), "test/bpb": pytest.approx(2)}


def test_tokens_are_weighed_over_the_whole_set_not_per_row():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    engine = FakeEngine(vocabulary=2, logits=logits)
    text = held_out([Datum([0, 1, 0], [0, 1, 2]), Datum([1, 1], [0, 1]), Datum([0, 0], [0, 0])], engine.language.decode)
    expected = -(math.log(0.5) + 2 * math.log(0.9) + math.log(0.1)) / 4
    assert nll(engine.trainer(), text)["test/nll"] == pytest.approx(expected)


def test_bytes_are_those_of_the_learned_text():
    text = held_out([Datum([0, 1, 2], [0, 0, 1])], lambda tokens: "é" * len(tokens))
    assert text.text_bytes == 2


def test_nothing_held_out_measures_nothing():
    assert nll(FakeEngine(vocabulary=2).trainer(), held_out([], str)) == {}
