"""Random forests, computed as a trie and as padded rows by transformers' own attention and peft's own adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import Linear as PeftLinear
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.engine.local import LocalEngine
from tercet.models.load import load_model
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model
from tercet.types import Batch, Datum, LoraConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROTATED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": ROTATED,
    "qwen2": {key: value for key, value in ROTATED.items() if key != "head_dim"},
    "qwen3": ROTATED,
    "gpt2": {key: value for key, value in SIZES.items() if key != "intermediate_size"},
}


ADAPTERS = {"whole": None, "lora": LoraConfig(rank=3, alpha=3)}


@pytest.fixture(scope="module", params=[f"{model}-{trained}" for model in sorted(MODELS) for trained in ADAPTERS])
def trainers(request, tmp_path_factory):
    """The same weights, once as a trie and once as padded rows."""
    model_type, trained = request.param.split("-")
    directory = tiny_model(tmp_path_factory.mktemp("model"))
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
        model.save_pretrained(directory)
    trie, rows = load_model(str(directory)), load_model(str(directory))
    rows.model.set_attn_implementation("eager")
    rows = replace(rows, why_no_tree="is computed as rows to compare", plain_head=ADAPTERS[trained] is None)
    found = [LocalEngine(loaded, micro_batch_tokens=24).trainer(lora=ADAPTERS[trained]) for loaded in (trie, rows)]
    if ADAPTERS[trained]:
        plain_adapters(rows.model)
        with torch.no_grad():
            for seed, (name, parameter) in enumerate(found[0].parameters.items()):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
                found[1].parameters[name].copy_(parameter)
    return found


def plain_adapters(model):
    """peft's own forward in every layer that tercet gave its own."""
    fused = [module for module in model.modules() if isinstance(module, PeftLinear) and "forward" in vars(module)]
    for module in fused:
        del module.forward


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, seed=st.integers(0, 99), span_tokens=st.sampled_from([4, 128]))
def test_losses_log_probs_and_gradients_of_any_forest_are_those_of_padded_rows(trainers, rows, seed, span_tokens):
    draw = torch.Generator().manual_seed(seed)
    batch = Batch([
        Datum(row, [0.0, *torch.randint(0, 3, (len(row) - 1,), generator=draw).float().tolist()]) for row in rows
    ])  # fmt: skip
    trie, padded = trainers
    for trainer in trainers:
        trainer.optimizer.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tercet.engine.outputs.SPAN_TOKENS", span_tokens)
        ours, theirs = (trainer.forward_backward(batch, "cross_entropy").result() for trainer in trainers)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-7)
    assert ours.logprobs == [pytest.approx(row, abs=2e-5) for row in theirs.logprobs]
    assert ours.metrics == {name: pytest.approx(value, abs=2e-5) for name, value in theirs.metrics.items()}
    for name, parameter in trie.parameters.items():
        other = padded.parameters[name].grad
        assert (parameter.grad is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=2e-4, atol=3e-6)
