from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tercet.engine.local import LocalEngine
from tercet.errors import ConfigError, EngineError, ModelError
from tercet.models import adapters
from tercet.models.load import load_model
from tercet.models.tiny import tiny_model
from tercet.types import AdamParams, Batch, Datum, LoraConfig

ROWS = [[40, 41, 42, 43], [50, 51, 52], [40, 41, 60]]
BATCH = Batch([Datum(row, [0.0, *[1.0] * (len(row) - 1)]) for row in ROWS])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def path(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), request.param)


def trained(engine, steps=3, **settings):
    trainer = engine.trainer(lora=LoraConfig(rank=4, alpha=8), **settings)
    for _ in range(steps):
        trainer.forward_backward(BATCH, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.05)).result()
    return trainer


def test_a_fresh_adapter_changes_not_a_bit(path):
    engine = LocalEngine(load_model(str(path)))
    trainer = engine.trainer(lora=LoraConfig(rank=4))
    ours = trainer.forward(BATCH).result().logprobs
    base = engine.sampler().logprobs(ROWS).result()
    assert [row[1:] for row in ours] == base
    assert trainer.sampler().logprobs(ROWS).result() == base


def test_the_merged_sampler_is_the_adapted_model(path):
    trainer = trained(LocalEngine(load_model(str(path))))
    merged = trainer.sampler().logprobs(ROWS).result()
    assert [row[1:] for row in trainer.forward(BATCH).result().logprobs] == [pytest.approx(r, abs=2e-5) for r in merged]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")  # peft's own
def test_peft_reads_a_saved_adapter_and_gives_the_same_numbers(path, tmp_path):
    trainer = trained(LocalEngine(load_model(str(path))))
    trainer.save(tmp_path / "adapter").result()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    for row, ours in zip(ROWS, trainer.sampler().logprobs(ROWS).result(), strict=True):
        tokens = torch.tensor([row])
        with torch.no_grad():
            logprobs = torch.log_softmax(adapted(input_ids=tokens).logits[0, :-1], -1)
        assert ours == pytest.approx(logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist(), abs=2e-5)


def test_a_saved_adapter_names_its_rank_its_targets_and_no_adapter_name(path, tmp_path):
    trainer = trained(LocalEngine(load_model(str(path))), steps=1)
    trainer.save(tmp_path).result()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    assert settings["inference_mode"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert not any("adapter0" in key or "lm_head" in key for key in tensors)
    config, read = adapters.read_adapter(tmp_path)
    assert (config.rank, config.alpha) == (4, 8)
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_a_reference_is_the_saved_policy_not_the_base(path, tmp_path):
    engine = LocalEngine(load_model(str(path)))
    sft = trained(engine)
    weights = sft.save(tmp_path / "sft").result()
    expected = sft.sampler().logprobs(ROWS).result()
    policy, reference = engine.trainer(init=weights), engine.sampler(weights)
    assert policy.sampler().logprobs(ROWS).result() == expected == reference.logprobs(ROWS).result()
    assert expected != engine.sampler().logprobs(ROWS).result()
    for _ in range(3):
        policy.forward_backward(BATCH, "cross_entropy").result()
        policy.optim_step(AdamParams(learning_rate=0.05)).result()
    assert reference.logprobs(ROWS).result() == expected
    assert policy.sampler().logprobs(ROWS).result() != expected


def test_an_adapter_as_init_brings_its_own_rank_and_targets(path, tmp_path):
    engine = LocalEngine(load_model(str(path)))
    weights = trained(engine, steps=1).save(tmp_path / "four").result()
    assert engine.trainer(init=weights, lora=LoraConfig(rank=16)).lora.rank == 4
    assert engine.trainer(init=weights).lora.rank == 4


def test_an_adapter_cannot_be_put_on_another_whole_model(path, tmp_path):
    engine = LocalEngine(load_model(str(path)))
    weights = engine.trainer().save(tmp_path / "whole").result()
    with pytest.raises(EngineError, match="holds a whole model, but an adapter sits on the base"):
        engine.trainer(init=weights, lora=LoraConfig())


def test_adapters_of_different_targets_do_not_mix(path):
    engine = LocalEngine(load_model(str(path)))
    few = "q_proj" if "q_proj" in str(engine.model) else "c_attn"
    base = engine.sampler().logprobs(ROWS).result()
    wide = trained(engine)
    narrow = engine.trainer(lora=LoraConfig(rank=2, targets=(few,)))
    assert all(few in name for name in narrow.parameters)
    wide.sampler().logprobs(ROWS).result()
    assert narrow.sampler().logprobs(ROWS).result() == base
    assert [row[1:] for row in narrow.forward(BATCH).result().logprobs] == base


def test_the_head_can_be_adapted_too(path):
    engine = LocalEngine(load_model(str(tiny_untied(path))))
    trainer = engine.trainer(lora=LoraConfig(rank=2, targets=("lm_head",)))
    for _ in range(3):
        trainer.forward_backward(BATCH, "cross_entropy").result()
        assert trainer.optim_step(AdamParams(learning_rate=0.05)).result().grad_norm > 0
    ours = [row[1:] for row in trainer.forward(BATCH).result().logprobs]
    assert ours == [pytest.approx(row, abs=2e-5) for row in trainer.sampler().logprobs(ROWS).result()]
    assert ours != [pytest.approx(row, abs=2e-5) for row in engine.sampler().logprobs(ROWS).result()]


def tiny_untied(path):
    architecture = json.loads((path / "config.json").read_text())["model_type"]
    return tiny_model(path.parent / f"untied-{architecture}", architecture, tied=False)


def test_what_is_no_adapter_of_this_model_is_refused(path, tmp_path):
    engine = LocalEngine(load_model(str(path)))
    trainer = trained(engine, steps=1)
    weights = trainer.save(tmp_path / "four").result()
    with pytest.raises(ModelError, match="rank, targets and base model must be those it was trained with"):
        engine.trainer(lora=LoraConfig(rank=8)).load(weights).result()
    with pytest.raises(ModelError, match="holds no adapter"):
        adapters.read_adapter(tmp_path)
    with pytest.raises(ConfigError, match="no adapter could be put on"):
        engine.trainer(lora=LoraConfig(targets=("no_such_layer",)))
    settings = json.loads((weights.path / "adapter_config.json").read_text())
    (weights.path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="holds a IA3 adapter; only LORA"):
        adapters.read_adapter(weights.path)


def test_the_base_never_needs_a_gradient(path):
    engine = LocalEngine(load_model(str(path)))
    trained(engine)
    assert all("lora_" in name for name, p in engine.model.named_parameters() if p.requires_grad)
    assert all(p.grad is None for name, p in engine.model.named_parameters() if "lora_" not in name)
