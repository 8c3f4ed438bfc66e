"""What only the engine with real models has to get right."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.engine.base import Engine, Trainer
from tercet.engine.local import LocalEngine
from tercet.errors import EngineError, ModelError
from tercet.models.load import load_model
from tercet.types import AdamParams, LoraConfig, SamplingParams, Weights

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


def test_samplers_share_the_bases_tensors():
    engine = LocalEngine(load_model("tiny"))
    adapter = engine.trainer(lora=LoraConfig(rank=4, targets=("q_proj",)))
    adapter.sampler().logprobs([[3, 4]]).result()
    base, work = engine.model, engine.body(engine.model).trunk
    used = adapter.sampler().body().trunk
    assert used is not work
    assert used.layers[0].mlp.up_proj.weight.data_ptr() == base.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert used.layers[0].self_attn.q_proj.weight.data_ptr() != work.layers[0].self_attn.q_proj.weight.data_ptr()


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
    from tercet.models.tiny import tiny_model

    engine = LocalEngine(load_model(str(tiny_model(tmp_path, "gpt2"))))  # its config asks for dropout of 0.1
    for trainer in (engine.trainer(), engine.trainer(lora=LORA)):
        assert not trainer.body().trunk.training
        assert all(not isinstance(m, torch.nn.Dropout) or m.p == 0 for m in trainer.body().trunk.modules())
