"""What only the engine with real models has to get right."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.algorithms.policy_gradient import synchronised
from tercet.engine.base import Engine, Trainer
from tercet.engine.bodies import same_bits
from tercet.engine.local import LocalEngine
from tercet.errors import EngineError, ModelError, TrainingError
from tercet.models import frozen_llama
from tercet.models.load import load_model
from tercet.models.tiny import tiny_model
from tercet.types import AdamParams, Batch, Datum, Head, LoraConfig, SamplingParams, Weights

LORA = LoraConfig(rank=4, alpha=8)


def test_the_local_engine_is_an_engine():
    engine: Engine = LocalEngine(load_model("tiny"))
    trainers: list[Trainer] = [engine.trainer(), engine.trainer(lora=LORA)]
    assert {trainer.context_tokens for trainer in trainers} == {engine.context_tokens} == {1024}


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_bfloat16_base_learns_in_float32(batch, lora, tmp_path):
    engine = LocalEngine(load_model("tiny", dtype="bfloat16"))
    trainer = engine.trainer(lora=lora)
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.forward_backward(batch, "cross_entropy").result()
    moving = {name: p.grad != 0 for name, p in trainer.parameters.items()}
    trainer.optim_step(AdamParams(learning_rate=3e-7)).result()
    moved = sum(int((p != before[name])[moving[name]].sum()) for name, p in trainer.parameters.items())
    assert moved >= 0.99 * sum(int(mask.sum()) for mask in moving.values()) > 0
    sampler = trainer.sampler()
    [[completion]] = sampler.sample([[3, 4]], SamplingParams(max_tokens=4)).result()
    assert len(completion.tokens) >= 1
    weights = trainer.save(tmp_path).result()
    assert engine.sampler(weights).fingerprint() == sampler.fingerprint() == trainer.fingerprint()


def test_a_model_in_bfloat16_can_be_a_frozen_sampler(tmp_path):
    model = load_model("tiny", dtype="bfloat16").model
    model.save_pretrained(tmp_path)
    sampler = LocalEngine(load_model("tiny")).sampler(Weights(tmp_path))
    assert len(sampler.fingerprint()) == 64
    assert len(sampler.logprobs([[3, 4, 5]]).result()[0]) == 2


@pytest.mark.parametrize("tokens", [2048, 2])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_pairs_without_a_weighted_token_add_nothing_to_the_gradient(lora, tokens):
    def gradient(*rows):
        engine = LocalEngine(load_model("tiny"))
        engine.budgets.micro_batch_tokens = tokens
        trainer = engine.trainer(lora=lora, seed=0)
        for parameter in trainer.parameters.values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        data = [Datum(r, w, {"reference_logprobs": [0.0] * len(r)}) for r, w in rows]
        pairs = [(i, i + 1) for i in range(0, len(data), 2)]
        trainer.forward_backward(Batch(data, pairs, pair_weights=[1.0, 0.0][: len(pairs)]), "sigmoid").result()
        return {name: parameter.grad for name, parameter in trainer.parameters.items()}

    learned = [([3, 4, 5], [0.0, 1.0, 1.0]), ([3, 6, 7], [0.0, 1.0, 1.0])]
    silent = [([8, 9], [0.0, 0.0]), ([8, 10], [0.0, 0.0])]
    assert all(grad is None or not grad.any() for grad in gradient(*silent).values())
    alone, beside = gradient(*learned), gradient(*learned, *silent)
    for name, grad in alone.items():
        torch.testing.assert_close(beside[name], grad)
    assert any(grad is not None and grad.any() for grad in alone.values())


def test_nothing_at_a_path_is_refused(tmp_path):
    with pytest.raises(EngineError, match="holds neither an adapter nor model.safetensors"):
        LocalEngine(load_model("tiny")).sampler(Weights(tmp_path))


def test_an_adapter_that_cannot_be_taken_over_leaves_nothing_behind(tmp_path):
    engine = LocalEngine(load_model("tiny"))
    trainer = engine.trainer(lora=LORA)
    weights = trainer.save(tmp_path).result()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="the saved adapter has"):
        engine.trainer(init=weights)
    assert list(trainer.peft.peft_config) == [trainer.name]


def learned(engine: LocalEngine, targets: str) -> Trainer:
    trainer = engine.trainer(lora=LoraConfig(rank=4, targets=(targets,)))
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.3)
    return trainer


def test_a_whole_model_tells_without_a_hash_whether_a_sampler_holds_its_weights(batch, monkeypatch):
    engine = LocalEngine(load_model("tiny"))
    trainer, other = engine.trainer(head=Head()), engine.trainer(lora=LORA)
    sampler = trainer.sampler()
    monkeypatch.setattr("hashlib.sha256", None)
    assert trainer.is_held_by(sampler) and trainer.is_held_by(synchronised(trainer))
    assert not trainer.is_held_by(engine.sampler()) and not trainer.is_held_by(other.sampler())
    for name in ("model.norm.weight", "score.weight"):
        [key] = [key for key in sampler.tensors if key.endswith(name)]
        one = sampler.tensors[key].view(-1)[-1:]
        kept = one.clone()
        one.copy_(torch.nextafter(kept, 2 * kept))
        assert not trainer.is_held_by(sampler)
        one.copy_(kept)
    assert trainer.is_held_by(sampler)
    trainer.forward_backward(batch, "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-3)).result()
    assert not trainer.is_held_by(sampler) and trainer.is_held_by(trainer.sampler())


def test_a_whole_models_sampler_that_holds_older_weights_is_found_out(batch):
    trainer = LocalEngine(load_model("tiny")).trainer()
    old = trainer.sampler()
    trainer.forward_backward(batch, "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-3)).result()

    class Late(type(trainer)):
        def sampler(self):
            return old

    trainer.__class__ = Late
    with pytest.raises(TrainingError, match="the sampler holds weights"):
        synchronised(trainer)


def test_bits_are_compared_and_not_numbers():
    zero, nan = torch.zeros(2), torch.full((2,), math.nan)
    assert same_bits({"a": nan}, {"a": nan.clone()})
    assert not same_bits({"a": zero}, {"a": -zero})
    assert not same_bits({"a": zero}, {"b": zero})
    assert not same_bits({"a": zero}, {"a": zero.bfloat16()})
    assert not same_bits({"a": zero}, {"a": zero[:1]})
    assert same_bits({"a": zero.bfloat16()}, {"a": zero.bfloat16()})


def test_a_whole_model_is_read_once_for_all_that_have_it_and_anew_when_it_was_written_anew(batch, tmp_path):
    engine = LocalEngine(load_model("tiny"))
    trainer = engine.trainer()
    weights = trainer.save(tmp_path).result()
    first, second = engine.sampler(weights), engine.sampler(weights)
    assert {name: each.data_ptr() for name, each in first.tensors.items()} == {
        name: each.data_ptr() for name, each in second.tensors.items()
    }
    trainer.forward_backward(batch, "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    third = engine.sampler(trainer.save(tmp_path).result())
    assert first.fingerprint() == second.fingerprint() != third.fingerprint() == trainer.fingerprint()


def test_samplers_share_the_bases_tensors(tmp_path):
    engine = LocalEngine(load_model(str(tiny_model(tmp_path, "gpt2"))))
    used, base = learned(engine, "c_attn").sampler().body().trunk, engine.model.transformer
    assert used is not base
    assert used.h[0].mlp.c_fc.weight.data_ptr() == base.h[0].mlp.c_fc.weight.data_ptr()
    assert used.h[0].attn.c_attn.weight.data_ptr() != base.h[0].attn.c_attn.base_layer.weight.data_ptr()


def test_where_weights_are_laid_out_for_the_cpu_merged_ones_are_kept_nowhere_else():
    engine = LocalEngine(load_model("tiny"))
    own = {weight.data_ptr() for weight in engine.model.parameters()}
    trainer = learned(engine, "q_proj")
    rows = [[3, 4, 5, 6]]
    [said] = trainer.sampler().logprobs(rows).result()
    body = trainer.sampler().body()
    assert {weight.data_ptr() for weight in body.trunk.parameters()} <= own
    assert said == pytest.approx(trainer.forward(Batch([Datum(rows[0], [0.0, 1, 1, 1])])).result().logprobs[0][1:])
    assert said != pytest.approx(engine.sampler().logprobs(rows).result()[0], abs=0.01)
    with pytest.raises(EngineError, match="merged where nothing learns"):
        body.states(rows)


def test_what_is_laid_out_for_sampling_makes_room_for_a_gradient(batch):
    engine = LocalEngine(load_model("tiny"))
    trainer, base = learned(engine, "q_proj"), engine.sampler()
    said = base.logprobs([[3, 4, 5]]).result()
    trunk = base.body().trunk
    assert trunk in frozen_llama._KEPT
    trainer.forward_backward(batch, "cross_entropy").result()
    assert trunk not in frozen_llama._KEPT
    assert base.logprobs([[3, 4, 5]]).result() == said


def test_an_adapter_is_found_merged_after_a_whole_model_of_another_precision(monkeypatch):
    monkeypatch.setattr(frozen_llama, "multiplies_bfloat16", lambda: False)
    engine = LocalEngine(load_model("tiny", dtype="bfloat16"))
    adapter, whole = learned(engine, "q_proj").sampler(), engine.trainer().sampler()
    first = adapter.logprobs([[3, 4, 5]]).result()
    whole.logprobs([[3, 4, 5]]).result()  # float32, which is laid out; the adapter's base is not
    assert adapter.logprobs([[3, 4, 5]]).result() == first


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_bfloat16_head_gives_the_same_log_prob_wherever_it_is_asked(architecture, tmp_path):
    sampler = LocalEngine(load_model(str(tiny_model(tmp_path, architecture)), dtype="bfloat16")).sampler()
    [[drawn]] = sampler.sample([[3, 4, 5]], SamplingParams(max_tokens=1)).result()
    rows = [[3, 4, 5, *drawn.tokens]]
    [scored] = sampler.logprobs(rows, [3]).result()
    [[table]] = sampler.top_logprobs(rows, 100_000, [3]).result()
    # Logits rounded to bfloat16 would be off by thousandths.
    assert scored == pytest.approx(drawn.logprobs, abs=1e-5)
    assert dict(table)[drawn.tokens[0]] == pytest.approx(scored[0], abs=1e-5)


def test_a_whole_models_embedding_and_head_stay_tied(batch, tmp_path):
    engine = LocalEngine(load_model("tiny"))
    trainer = engine.trainer()
    for _ in range(2):
        trainer.forward_backward(batch, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.01)).result()
    resumed = engine.trainer(init=trainer.save(tmp_path).result())
    for each in (trainer, resumed):
        assert each.model.lm_head.weight.data_ptr() == each.model.model.embed_tokens.weight.data_ptr()
    body = trainer.sampler().body()
    assert body.head.weight.data_ptr() == body.trunk.embed_tokens.weight.data_ptr()


def test_dropout_is_off_while_learning(tmp_path):
    engine = LocalEngine(load_model(str(tiny_model(tmp_path, "gpt2"))))  # its config asks for dropout of 0.1
    for trainer in (engine.trainer(), engine.trainer(lora=LORA)):
        assert not trainer.body().trunk.training
        assert all(not isinstance(m, torch.nn.Dropout) or m.p == 0 for m in trainer.body().trunk.modules())
