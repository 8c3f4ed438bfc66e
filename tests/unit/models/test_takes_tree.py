import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from tercet.engine.collate import Forest, forest
from tercet.errors import ModelError
from tercet.models import tree_attention
from tercet.models.quiet import quiet
from tercet.models.takes_tree import (
    ARCHITECTURES,
    UNBOUNDED_TOKENS,
    context_tokens,
    require_rows,
    takes_tree,
    why_no_tree,
)  # fmt: skip

CONTEXT = 64
# Every name some architecture has for a size; each takes those it knows.
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4,
    "n_head": 4, "num_key_value_heads": 2, "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "head_dim": 8, "max_position_embeddings": CONTEXT, "n_positions": CONTEXT,
    "word_embed_proj_dim": 32, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "sliding_window": CONTEXT, "logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None,
}  # fmt: skip


def small(model_type: str) -> PretrainedConfig:
    default = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    derived = isinstance(getattr(type(default), "layer_types", None), property)
    if getattr(default, "layer_types", None) and not derived:
        sizes["layer_types"] = ["full_attention"] * 2
    if model_type == "phimoe":
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    return type(default)(**sizes)


def sequences() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> list[int]:
        return torch.randint(3, 60, (n,), generator=draw).tolist()

    prompt = some(6)
    return [prompt + some(5), prompt + some(3), prompt[:3] + some(4), some(9), prompt]


def layout(packed: Forest) -> tree_attention.ForestLayout:
    ends = torch.from_numpy(packed.subtree_end)
    spans = (tree_attention.span(unit.start, unit.end, unit.ancestors, ends) for unit in packed.units(4))
    return tree_attention.ForestLayout(tuple(spans))


@torch.no_grad()
def largest_difference(config: PretrainedConfig) -> float:
    """Between the logits of a random model over a forest and those of its plain forward, as a share of the largest."""
    rows = sequences()
    packed = forest(rows)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
        plain = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        model.set_attn_implementation(tree_attention.NAME)
        hidden = getattr(model, model.base_model_prefix)(
            input_ids=torch.from_numpy(packed.tokens)[None], position_ids=torch.from_numpy(packed.positions)[None],
            use_cache=False, layout=layout(packed),
        ).last_hidden_state[0]  # fmt: skip
        logits = model.get_output_embeddings()(hidden)
    pairs = zip(packed.paths, plain, strict=True)
    return max(float((logits[torch.from_numpy(path)] - alone).abs().max() / alone.abs().max()) for path, alone in pairs)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_listed_architecture_computes_a_forest_as_it_computes_each_sequence_alone(model_type):
    config = small(model_type)
    assert why_no_tree(config) is None
    assert largest_difference(config) < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "bloom", "gpt_oss", "mamba", "openai-gpt", "xglm"])
def test_an_architecture_that_mixes_tokens_otherwise_takes_no_forest_and_would_be_wrong(model_type):
    config = small(model_type)
    assert not takes_tree(config)
    assert largest_difference(config) > 1e-2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(), None),
        (GPT2Config(), None),
        (Qwen2Config(), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2), "windows of 4096 tokens"),
        (Qwen3Config(), None),
        (MistralConfig(sliding_window=None), None),
        (MistralConfig(max_position_embeddings=32768), "windows of 4096 tokens in a context of 32768"),
        (MistralConfig(sliding_window=4096, max_position_embeddings=4096), None),
        (Gemma2Config(sliding_window=8192), "architecture gemma2"),
        (MambaConfig(), "layers that are not plain attention (linear_attention)"),
        (AutoConfig.for_model("gemma3_text", sliding_window=512), "windows of 512 tokens"),
        (AutoConfig.for_model("qwen3_next"), "layers that are not plain attention (linear_attention)"),
        (AutoConfig.for_model("lfm2", full_attn_idxs=[2, 5]), "layers that are not plain attention (conv)"),
        (AutoConfig.for_model("granite", logits_scaling=8.0), "after the head (logits_scaling is 8)"),
        (AutoConfig.for_model("cohere"), "after the head (logit_scale is 0.0625)"),
        (AutoConfig.for_model("gemma3"), "made of several models"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope type dynamic"),
        (Phi3Config(sliding_window=2047), "windows of 2047 tokens in a context of 4096"),
    ],
)  # fmt: skip
def test_the_config_says_whether_a_model_takes_a_forest_and_why_not(config, reason):
    said = why_no_tree(config)
    assert takes_tree(config) == (reason is None)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "change", [{"logits_scaling": 8.0, "model_type": "granite"}, {"sliding_window": 4, "model_type": "mistral"}]
)
def test_what_the_config_check_refuses_would_indeed_be_wrong(change):
    config = small(change.pop("model_type"))
    for key, value in change.items():
        setattr(config, key, value)
    assert not takes_tree(config)
    assert largest_difference(config) > 1e-2


def test_code_that_came_with_a_model_takes_no_forest_whatever_its_config_says():
    assert why_no_tree(LlamaConfig(), own_code=True) == "is computed by code that came with it"


@pytest.mark.parametrize("config", [MambaConfig(), Gemma2Config(), AutoConfig.for_model("granite", logits_scaling=8.0)])
def test_what_takes_no_forest_may_compute_padded_rows(config):
    assert not takes_tree(config)
    require_rows(config, "my/model")


def test_a_model_that_cannot_is_refused_with_its_name_the_reason_and_what_can():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match=r"my/llama rotates by the longest sequence at hand .*Llama, Qwen2"):
        require_rows(LlamaConfig(rope_parameters=rope), "my/llama")
    with pytest.raises(ModelError, match=r"my/gemma is made of several models \(gemma3\)"):
        require_rows(AutoConfig.for_model("gemma3"), "my/gemma")


def test_the_context_is_found_under_every_name_it_has():
    assert context_tokens(GPT2Config(n_positions=77)) == 77
    assert context_tokens(LlamaConfig(max_position_embeddings=88)) == 88
    assert context_tokens(MambaConfig()) == UNBOUNDED_TOKENS
    with pytest.raises(ModelError, match="does not say how long"):
        context_tokens(AutoConfig.for_model("bloom"))
