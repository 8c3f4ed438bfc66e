import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.engine.collate import forest
from tercet.errors import ModelError
from tercet.models import adapters, tree_attention
from tercet.models.frozen_llama import LAYERS, frozen_llama
from tercet.models.lean_layers import slim
from tercet.models.load import load_model
from tercet.models.memory import LAID_OUT, estimate, pass_tokens, read_shape, shape
from tercet.models.tiny import tiny_model
from tercet.types import LoraConfig

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_parameters_of_smollm2_are_counted_exactly():
    assert shape(SMOLLM2).parameters == 134_515_008


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "olmo2", "gpt_neox", "mixtral"])
def test_parameters_are_counted_to_two_percent(model_type):
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    assert shape(json.loads(config.to_json_string(use_diff=False))).parameters == pytest.approx(wanted, rel=0.02)


def test_an_adapter_and_its_optimizer_are_counted_exactly(tmp_path):
    directory = tiny_model(tmp_path)
    wrapped = adapters.add_adapter(load_model(str(directory)).model, "a", LoraConfig(rank=8), base="tiny", seed=0)
    trained = sum(parameter.numel() for parameter in adapters.adapter_parameters(wrapped, "a").values())
    assert estimate(read_shape(directory), lora_rank=8).trained == 16 * trained
    assert estimate(read_shape(directory), lora_rank=8, adapters=2).trained == 32 * trained
    whole = sum(parameter.numel() for parameter in wrapped.get_base_model().parameters()) - trained
    assert estimate(read_shape(directory), lora_rank=None).trained == 16 * whole


@pytest.mark.parametrize("rank", [16, None], ids=["adapter", "whole model"])
def test_activations_are_estimated_to_a_tenth(tmp_path, rank):
    directory = tiny_model(tmp_path, hidden=128)
    loaded = load_model(str(directory))
    if rank:
        slim(adapters.add_adapter(loaded.model, "a", LoraConfig(rank=rank), base="tiny", seed=0))
    else:
        loaded.model.requires_grad_(True)
    weights = {parameter.data_ptr() for parameter in loaded.model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    packed = forest([list(range(3, 259))])
    ends = torch.from_numpy(packed.subtree_end)
    spans = (tree_attention.span(u.start, u.end, u.ancestors, ends) for u in packed.units(256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loaded.model.model(
            input_ids=torch.from_numpy(packed.tokens)[None], position_ids=torch.from_numpy(packed.positions)[None],
            use_cache=False, layout=tree_attention.ForestLayout(tuple(spans)),
        )  # fmt: skip
    measured = sum(size for size, _ in kept.values())
    said = estimate(read_shape(directory), lora_rank=rank, micro_batch_tokens=256).activations
    assert said == pytest.approx(measured, rel=0.1)


def test_the_cache_of_a_batch_is_two_numbers_a_head_and_token():
    memory = estimate(shape(SMOLLM2), sampled_rows=128, row_tokens=200, dtype="bfloat16", on_cpu=False)
    assert memory.kv_cache == 128 * 200 * 30 * 2 * 3 * 64 * 2
    # Attention on a CPU is in float32.
    on_cpu = estimate(shape(SMOLLM2), sampled_rows=128, row_tokens=200, dtype="bfloat16")
    assert on_cpu.kv_cache == 2 * memory.kv_cache
    assert memory.merged == 2 * 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)
    # There they are merged as they are laid out, but for vLLM.
    assert (on_cpu.merged, on_cpu.laid_out) == (0, memory.merged + 4 * 49152 * 576)
    assert estimate(shape(SMOLLM2), sampled_rows=128, row_tokens=200, vllm_bytes=1).merged == 2 * memory.merged


def test_training_and_sampling_share_what_only_one_of_them_needs():
    memory = estimate(shape(SMOLLM2), sampled_rows=128, row_tokens=200)
    larger = max(memory.activations + memory.backward, memory.laid_out + memory.kv_cache)
    assert memory.total == memory.base + memory.merged + memory.trained + memory.head + larger
    assert memory.describe().startswith(f"{memory.total / 1e9:.2f} GB (base 0.54, laid out 0.54,")


def test_a_whole_model_learns_and_is_sampled_in_float32_whatever_the_base_is():
    settings = {"lora_rank": None, "sampled_rows": 128, "row_tokens": 200, "references": 2, "on_cpu": False}
    low, high = (estimate(shape(SMOLLM2), dtype=dtype, **settings) for dtype in ("bfloat16", "float32"))
    weights = 134_515_008
    assert (low.base, high.base) == (2 * weights, 4 * weights)
    assert replace(low, base=0) == replace(high, base=0)
    assert (low.trained, low.merged, low.references, low.handed_over) == tuple(4 * n * weights for n in (4, 1, 2, 1))
    assert low.kv_cache == 128 * 200 * 30 * 2 * 3 * 64 * 4
    unsampled = estimate(shape(SMOLLM2), lora_rank=None)
    assert (unsampled.merged, unsampled.references, unsampled.handed_over) == (0, 0, 0)
    adapter = estimate(shape(SMOLLM2), sampled_rows=128, row_tokens=200, references=2)
    assert (adapter.references, adapter.handed_over) == (0, 0)


def test_the_next_whole_model_to_sample_from_is_made_beside_the_last():
    memory = estimate(shape(SMOLLM2), lora_rank=None, micro_batch_tokens=64, sampled_rows=1, row_tokens=1, on_cpu=False)
    assert memory.handed_over > max(memory.activations + memory.backward, memory.kv_cache)
    assert memory.total == memory.base + memory.merged + memory.trained + memory.head + memory.handed_over


@pytest.mark.parametrize(
    ("gib", "rank", "tokens"), [(None, 16, 1024), (80, 16, 16384), (24, 16, 8192), (24, None, 4096), (0.5, 16, 1024)]
)
def test_as_many_tokens_pass_at_once_as_take_a_quarter_of_a_gpu(gib, rank, tokens):
    gpu = None if gib is None else int(gib * 2**30)
    assert pass_tokens(shape(SMOLLM2), gpu, lora_rank=rank, dtype="bfloat16") == tokens


def test_the_copy_laid_out_for_the_cpu_is_counted_exactly(tmp_path):
    directory = tiny_model(tmp_path)
    model = load_model(str(directory)).model
    fast = frozen_llama(model.model, model.lm_head)
    parts = [part for one in fast.layers for part in (one.qkv, one.out, one.gate, one.up, one.down)]
    assert estimate(read_shape(directory)).laid_out == 4 * sum(part.weight.numel() for part in [*parts, fast.head])


@pytest.mark.parametrize(
    ("model_type", "settings"), [("gpt2", {}), ("gpt2", {"dtype": "bfloat16"}), ("llama", {"on_cpu": False})]
)
def test_nothing_is_laid_out_for_another_kind_of_model_or_device(model_type, settings):
    model = shape(json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False)))
    assert estimate(model, **settings).laid_out == 0


def test_what_the_estimate_calls_laid_out_is_what_the_fast_form_takes():
    assert {name.lower().removesuffix("decoderlayer") for name in LAYERS} == LAID_OUT


def test_a_config_without_a_size_is_refused_with_its_name(tmp_path):
    with pytest.raises(ModelError, match="hidden_size or n_embd"):
        shape({"num_hidden_layers": 2})
    with pytest.raises(ModelError, match="no config.json"):
        read_shape(tmp_path)
