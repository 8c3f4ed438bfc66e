"""What a session takes of the machine, and says of it."""

from __future__ import annotations

import re

import pytest
import torch

from tercet.models.memory import estimate, read_shape
from tercet.recipes.session import SetupConfig, local_engine, open_session
from tercet.types import Message


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "said", "taken"), [(2, "3", 2), (None, "3", 3)])
def test_threads_that_are_asked_for_win_over_omp_num_threads(asked, said, taken, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    local_engine(SetupConfig(model="tiny", threads=asked))
    assert torch.get_num_threads() == taken


def test_comparisons_tied_in_both_orders_are_counted_beyond_a_micro_batch():
    session = open_session(SetupConfig(model="tiny", micro_batch_tokens=64), lambda _: None)

    def megabytes(**settings):
        return int(re.fullmatch(r"about (\d+) MB beside Python", session.memory(**settings))[1])

    short, alone, tied = (megabytes(longest_tokens=n, tied=k) for n, k in ((32, 2), (512, 1), (512, 2)))
    assert short < alone < tied
    assert megabytes(longest_tokens=5000) == megabytes(longest_tokens=1024)  # the model takes no more


def test_a_pass_has_as_many_tokens_as_are_asked_for_and_on_a_cpu_1024_where_none_are():
    for asked, taken in ((None, 1024), (64, 64)):
        session = open_session(SetupConfig(model="tiny", device="cpu", micro_batch_tokens=asked), lambda _: None)
        assert (session.engine.budgets.micro_batch_tokens, session.setup.micro_batch_tokens) == (taken, taken)


def test_a_whole_model_that_is_sampled_from_has_a_reference_beside_it():
    setups = (SetupConfig(model="tiny", method=method, micro_batch_tokens=64) for method in ("lora", "full"))
    lora, full = (open_session(setup, lambda _: None) for setup in setups)
    room = {"lora_rank": None, "micro_batch_tokens": 64, "sampled_rows": 4, "row_tokens": 32, "longest_tokens": 32}
    expected = estimate(read_shape(full.engine.loaded.path), references=1, **room)
    assert full.memory(sampled_rows=4, row_tokens=32, others=1) == f"about {expected.total / 1e6:.0f} MB beside Python"
    assert full.memory(sampled_rows=4, row_tokens=32, others=1) != full.memory(sampled_rows=4, row_tokens=32)
    assert full.memory(sampled_rows=4, row_tokens=32) != lora.memory(sampled_rows=4, row_tokens=32)


def test_the_longest_conversation_is_found_by_its_characters_and_cut():
    session = open_session(SetupConfig(model="tiny"), lambda _: None)
    texts = [(Message("user", "word " * n),) for n in (3, 50, 7)]
    tokens = len(session.tokenizer.encode("word " * 50, add_special_tokens=False))
    assert session.longest(texts, 1000) == tokens
    assert session.longest(texts, 20) == 20
    assert session.longest([], 20) == 0
