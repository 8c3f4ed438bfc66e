"""The fast form of a model gives what the model gives, whatever weights are put into it."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tercet.engine.collate import forest
from tercet.engine.outputs import Body, forest_layout
from tercet.models import tree_attention
from tercet.models.cpu import multiplies_bfloat16
from tercet.models.frozen_llama import frozen_llama

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "sliding_window": None,
}  # fmt: skip
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ROWS = [[5, 9, 3, 7, 7, 1], [5, 9, 3, 8], [5, 9, 40, 41, 42, 43, 44], [60]]


def small(model_type: str, **settings: object) -> PretrainedConfig:
    default = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    if model_type == "smollm3":
        sizes["no_rope_layers"] = [1, 0]
    if model_type == "llama":
        sizes["attention_bias"] = sizes["mlp_bias"] = True
    return type(default)(**{**sizes, **settings})


def made(model_type: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(model_type, **settings), attn_implementation=tree_attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, which begin as ones and zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def both(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a forest as the model computes them, and as its fast form does."""
    packed = forest(ROWS)
    body = Body(model.model, model.lm_head, torch.device("cpu"), 64)
    layout = forest_layout(packed, body.device)
    fast = frozen_llama(body.trunk, body.head)
    assert fast is not None
    with torch.inference_mode():
        tokens, positions = torch.from_numpy(packed.tokens), torch.from_numpy(packed.positions)
        out = body.trunk(input_ids=tokens[None], position_ids=positions[None], use_cache=False, layout=layout)
        return body.head(out.last_hidden_state[0]), fast.logits(fast.hidden(tokens, positions, layout))


@pytest.mark.parametrize("model_type", KNOWN)
def test_the_logits_are_the_models(model_type):
    plain, fast = both(made(model_type))
    assert plain.std() > 0.1
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="needs a CPU that multiplies bfloat16")
@pytest.mark.parametrize("model_type", KNOWN)
def test_bfloat16_is_no_further_from_float32_than_the_models_own(model_type):
    model = made(model_type)
    exact, _ = both(model)
    plain, fast = both(model.to(torch.bfloat16))
    assert fast.dtype == torch.float32
    ours, theirs = ((each.float() - exact).square().mean().sqrt() for each in (fast, plain))
    assert 0 < ours < 1.2 * theirs


def test_scaled_rotation_is_the_models():
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    plain, fast = both(made("llama", rope_parameters=rope))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def foreign(layer):
    return type(type(layer).__name__, (type(layer),), {"__module__": "remote_code"})


def written(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


def replaced(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, torch.nn.Parameter(parameter * 1.5, requires_grad=False))
    gc.collect()


@pytest.mark.parametrize("change", [written, replaced])
def test_weights_written_or_replaced_afterwards_are_seen(change):
    model = made("qwen3")
    before, _ = both(model)
    with torch.no_grad():
        change(model)
    plain, fast = both(model)
    assert (plain - before).abs().max() > 0.1
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_weights_that_stay_are_laid_out_once():
    model = made("llama")
    first = frozen_llama(model.model, model.lm_head)
    assert first is not None
    kept = first.layers[0].qkv.weight, first.layers[1].qkv.weight
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(2)
    again = frozen_llama(model.model, model.lm_head)
    assert again is first and again.layers[0].qkv.weight is kept[0] and again.layers[1].qkv.weight is not kept[1]


@pytest.mark.parametrize("model_type", ["gpt2", "olmo2", "gemma", "phi3", "qwen2_moe"])
def test_other_architectures_have_no_fast_form(model_type):
    default = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in {**SIZES, "num_experts": 2}.items() if hasattr(default, key)}
    model = AutoModelForCausalLM.from_config(type(default)(**sizes))
    assert frozen_llama(getattr(model, model.base_model_prefix), model.get_output_embeddings()) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float16),
        lambda model: setattr(model.model.layers[1], "__class__", foreign(model.model.layers[1])),
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
        lambda model: setattr(model.model.layers[1].mlp, "up_proj", torch.nn.Sequential(torch.nn.Linear(32, 48))),
    ],
    ids=["float16", "a layer of that name from elsewhere", "activation", "not a linear layer"],
)
def test_a_part_that_is_not_known_is_noticed_even_after_the_first_time(change):
    model = made("llama")
    assert frozen_llama(model.model, model.lm_head) is not None
    change(model)
    assert frozen_llama(model.model, model.lm_head) is None


def test_a_fast_form_goes_with_its_model():
    from tercet.models import frozen_llama as module

    model = made("llama")
    before = len(module._KEPT)
    frozen_llama(model.model, model.lm_head)
    assert len(module._KEPT) == before + 1
    del model
    gc.collect()
    assert len(module._KEPT) == before
