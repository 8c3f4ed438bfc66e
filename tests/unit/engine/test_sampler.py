"""Decoding against plain transformers, and rows, prompts and caches under every mixture of lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.engine.kv_cache import Decode, KeyValueCache
from tercet.engine.local import LocalEngine
from tercet.engine.sampler import _Rows
from tercet.models.frozen_llama import _Linear, frozen_llama
from tercet.models.load import load_model
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams

LENGTHS = (3, 40, 7, 41, 90, 1)


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 500, size=length).tolist() for length in LENGTHS]


def qwen(directory, model_type):
    """A random Qwen in the place of the Llama of that directory."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type, vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and the norms of queries and keys too
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(directory)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "qwen3"])
def test_greedy_decoding_takes_the_tokens_that_transformers_takes(architecture, tmp_path):
    directory = tiny_model(tmp_path, "gpt2" if architecture == "gpt2" else "llama", context=128)
    if architecture.startswith("qwen"):
        qwen(directory, architecture)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    engine = LocalEngine(load_model(str(directory)), max_rows=5)
    found = engine.sampler().sample(prompts(), SamplingParams(max_tokens=20, temperature=0.0), 2).result()
    for prompt, group in zip(prompts(), found, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for completion in group:
            assert list(completion.tokens) == expected[: len(completion.tokens)]
            assert len(completion.tokens) == len(expected)
            logits = plain(torch.tensor([[*prompt, *completion.tokens]])).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits, -1)[range(len(completion.tokens)), list(completion.tokens)]
            assert completion.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_two_adapters_that_take_turns_in_the_work_copy_sample_what_each_samples_alone():
    params = SamplingParams(max_tokens=8, seed=3)

    def trained(engine, tokens):
        trainer = engine.trainer(lora=LoraConfig(rank=4), seed=1)
        for _ in range(3):
            trainer.forward_backward(Batch([Datum(tokens, [0.0, *[1.0] * (len(tokens) - 1)])]), "cross_entropy")
            trainer.optim_step(AdamParams(learning_rate=0.05)).result()
        return trainer.sampler()

    def alone(tokens):
        return trained(LocalEngine(load_model("tiny")), tokens).sample(prompts(), params, 2).result()

    engine = LocalEngine(load_model("tiny"))
    base = engine.sampler()
    one, other = trained(engine, [3, 4, 5]), trained(engine, [3, 7, 9, 11])
    plain = base.sample(prompts(), params, 2).result()
    for _ in range(2):
        assert one.sample(prompts(), params, 2).result() == alone([3, 4, 5])
        assert other.sample(prompts(), params, 2).result() == alone([3, 7, 9, 11])
        assert base.sample(prompts(), params, 2).result() == plain
    assert one.sample(prompts(), params, 2).result() != plain


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_that_leave_are_replaced_by_the_last_ones(data):
    n = data.draw(st.integers(1, 8))
    rows = _Rows(8, 3)
    for i in range(n):
        rows.enter(i, 10 * i, 100 + i, np.full(3, i / 10))
    gone = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    moves = rows.close(gone)
    assert sorted(rows.prompt[: len(rows)].tolist()) == [i for i in range(n) if i not in gone]
    assert (rows.sample[: len(rows)] == 10 * rows.prompt[: len(rows)]).all()
    assert (rows.uniform[: len(rows), 2] == rows.prompt[: len(rows)] / 10).all()
    assert all(source >= len(rows) > to for source, to in moves)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_decoding_attends_to_a_rows_prompt_and_own_tokens_and_to_nothing_else(data):
    """Against attention written out: prompts of any lengths, any number of samples, rows that left, any own tokens."""
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    samples = [data.draw(st.integers(1, 3)) for _ in lengths]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    cache = KeyValueCache(sum(samples) + 2, 50, torch.device("cpu"))
    at, owners, prompt_of = 0, [], []
    for i, n in enumerate(samples):
        owners.append(list(range(at, at + n)))
        prompt_of += [i] * n
        at += n
    kept = [torch.randn(2, 2, length, 4, generator=generator) for length in lengths]  # (key or value, kv_heads, P, d)
    for part, block in zip(cache.add(lengths, owners), cache.blocks, strict=True):
        block.keys.append(torch.randn(len(part), 2, block.tokens, 4, generator=generator))
        block.values.append(torch.randn(len(part), 2, block.tokens, 4, generator=generator))
        for row, i in enumerate(part):
            block.keys[0][row, :, : lengths[i]], block.values[0][row, :, : lengths[i]] = kept[i]
    own = [torch.randn(2, 2, data.draw(st.integers(1, 40)), 4, generator=generator) for _ in prompt_of]
    keys, values = cache.store(0, torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), 40)
    for row, each in enumerate(own):
        keys[row, :, : each.shape[2]], values[row, :, : each.shape[2]] = each
    gone = data.draw(st.lists(st.integers(0, at - 1), unique=True, max_size=at - 1))
    table = _Rows(at, 1)
    for row in range(at):
        table.enter(row, 0, 0, np.zeros(1))
    cache.close(gone, table.close(gone), 40)
    left = table.prompt[: len(table)].tolist()
    query = torch.randn(4, len(left), 4, generator=generator)
    newest = torch.randn(2, 2, len(left), 4, generator=generator)
    layout = Decode.of(cache, np.array([own[row].shape[2] for row in left]))
    found = layout.attend(0, query, newest[0], newest[1], 0.5)
    for place, row in enumerate(left):
        k, v = torch.cat([kept[prompt_of[row]], own[row], newest[:, :, place, None]], dim=2)
        for head in range(4):
            weights = torch.softmax(0.5 * k[head // 2] @ query[head, place], -1)
            torch.testing.assert_close(found[head, place], weights @ v[head // 2], atol=1e-5, rtol=1e-5)


def test_prompts_of_like_length_share_a_block():
    cache = KeyValueCache(6, 10, torch.device("cpu"))
    parts = cache.add([100, 20, 30, 160, 400, 22], [[i] for i in range(6)])
    assert parts == [[1, 5, 2], [0, 3], [4]]
    assert [block.tokens for block in cache.blocks] == [32, 160, 400]  # whole steps of 8


def test_room_for_own_tokens_grows_as_it_is_needed():
    cache = KeyValueCache(2, 70, torch.device("cpu"))
    like = torch.zeros(1, 2, 4)
    rooms = []
    for tokens in (1, 32, 33, 65, 70):
        keys, _ = cache.store(0, like, like, cache.room(tokens))
        keys[:, :, tokens - 1] = tokens
        rooms.append(keys.shape[2])
    assert rooms == [32, 32, 64, 70, 70]
    assert keys[1, 0, [0, 31, 32, 64, 69], 0].tolist() == [1, 32, 33, 65, 70]


def test_room_is_given_back_when_the_longest_rows_have_left():
    cache = KeyValueCache(2, 200, torch.device("cpu"))
    cache.add([3], [[0, 1]])
    like = torch.zeros(1, 2, 4)
    keys, _ = cache.store(0, like, like, cache.room(130))
    keys[0, :, :40] = 7
    cache.close([1], [], 40)
    assert cache.room(41) == cache.keys[0].shape[2] == cache.values[0].shape[2] == 64
    assert cache.keys[0][0, 0, 39].tolist() == [7] * 4


def test_products_have_few_shapes_however_many_rows_there_are(monkeypatch):
    # For every new number of rows oneDNN writes code, which it keeps.
    if frozen_llama(*(lambda model: (model.model, model.lm_head))(load_model("tiny").model)) is None:
        pytest.skip("weights are not laid out on this CPU")
    rows: set[int] = set()
    product = _Linear.__call__
    monkeypatch.setattr(_Linear, "__call__", lambda self, x, *rest: rows.add(len(x)) or product(self, x, *rest))
    engine = LocalEngine(load_model("tiny"))
    params = SamplingParams(max_tokens=12, seed=1, stop=tuple(range(0, 400, 20)))
    for n in range(1, 30):
        engine.sampler().sample([[5, 9, 3 + i] for i in range(n)], params).result()
    assert rows == {1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 64}
