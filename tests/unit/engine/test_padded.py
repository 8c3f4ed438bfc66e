"""Models that take no packed forest, against plain transformers, one row at a time."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.engine.collate import padded_micro_batches
from tercet.engine.local import LocalEngine
from tercet.errors import ModelError
from tercet.models.load import load_model
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model
from tercet.types import AdamParams, Batch, Datum, Head, LoraConfig, SamplingParams

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
ARCHITECTURES = {
    "mistral": {**SMALL, "sliding_window": 4},
    "gemma2": {**SMALL, "sliding_window": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.8},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "gpt_oss": {**SMALL, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon_mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "qwen3_next": {
        **SMALL, **EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoehybrid": {
        **SMALL, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2,
        "mamba_chunk_size": 8, "logits_scaling": 4.0,
    },
}  # fmt: skip
ROWS = (
    [40, 41, 42, 43, 44, 45, 46, 47, 48], [40, 41, 42, 50, 51], [40, 41], [60, 61, 62, 63, 64, 65, 66], [80] * 12,
    [40, 41, 42, 43, 44, 45], [7],
)  # fmt: skip


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def path(request, tmp_path_factory):
    directory = tiny_model(tmp_path_factory.mktemp("models") / request.param)
    config = AutoConfig.for_model(request.param, **ARCHITECTURES[request.param])
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "A_log" not in name:
                    parameter.normal_(std=0.15)
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plain(path):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture
def batch():
    return Batch([
        Datum(row, [0.0, *(1.0 + (i + t) % 2 for t in range(len(row) - 1))]) for i, row in enumerate(ROWS)
    ])  # fmt: skip


def logits(model, tokens):
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def reference(model, batch):
    """Log-probs of each row alone, and the loss of the batch, whose gradient is taken."""
    rows, total = [], torch.zeros(())
    for datum in batch.data:
        picked = torch.log_softmax(logits(model, datum.tokens)[:-1], -1)
        picked = picked.gather(-1, torch.tensor([list(datum.tokens)])[0, 1:, None])[:, 0]
        total = total - (picked * torch.tensor(datum.weights[1:])).sum()
        rows.append([0.0, *picked.tolist()])
    loss = total / sum(datum.weight for datum in batch.data)
    loss.backward()
    return rows, float(loss.detach())


@pytest.mark.parametrize("budget", [2048, 20])
def test_losses_log_probs_and_every_gradient_are_those_of_the_plain_model(path, plain, batch, budget):
    plain.requires_grad_(True)
    plain.zero_grad()
    rows, loss = reference(plain, batch)
    trainer = LocalEngine(load_model(str(path)), micro_batch_tokens=budget).trainer()
    result = trainer.forward_backward(batch, "cross_entropy").result()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.logprobs == [pytest.approx(row, abs=2e-5) for row in rows]
    expected = dict(plain.named_parameters())
    assert expected.keys() == trainer.parameters.keys()
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=2e-4, atol=4e-6)


def test_greedy_samples_are_those_of_the_plain_model_token_for_token(path, plain):
    sampler = LocalEngine(load_model(str(path)), max_rows=3).sampler()
    prompts = [list(row) for row in ROWS]
    groups = sampler.sample(prompts, SamplingParams(max_tokens=8, temperature=0.0, eos=False), n=2).result()
    for prompt, (completion, other) in zip(prompts, groups, strict=True):
        assert completion.tokens == other.tokens
        tokens = torch.tensor([prompt])
        with quiet():
            theirs = plain.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None
            )
        assert list(completion.tokens) == theirs[0, len(prompt) :].tolist()
        with torch.no_grad():
            said = torch.log_softmax(logits(plain, [*prompt, *completion.tokens]), -1)[len(prompt) - 1 : -1]
        assert said.argmax(-1).tolist() == list(completion.tokens)
        assert list(completion.logprobs) == pytest.approx(said.amax(-1).tolist(), abs=2e-5)


def test_drawn_completions_know_no_neighbours_and_no_generation_config(path):
    (path / "generation_config.json").write_text('{"repetition_penalty": 3.0, "top_k": 2, "temperature": 0.1}')
    engine = LocalEngine(load_model(str(path)))
    params = SamplingParams(max_tokens=6, temperature=0.9, top_p=0.95, seed=3, stop=(7,))
    groups = engine.sampler().sample(ROWS, params, n=3).result()
    alone = LocalEngine(load_model(str(path)), max_rows=1).sampler().sample(ROWS, params, n=3).result()
    assert [[one.tokens for one in group] for group in groups] == [[one.tokens for one in group] for group in alone]
    assert len({one.tokens for group in groups for one in group}) > len(ROWS)
    free = SamplingParams(max_tokens=6, temperature=0.9)
    [[completion]] = engine.sampler().sample([ROWS[0]], free).result()
    whole = [*ROWS[0], *completion.tokens]
    [scored] = engine.sampler().logprobs([whole], [len(ROWS[0])], temperature=0.9).result()
    assert list(completion.logprobs) == pytest.approx(scored, abs=2e-5)


def test_a_completion_ends_where_the_others_go_on(path):
    sampler = LocalEngine(load_model(str(path))).sampler()
    first, second = [40, 41, 42], [50, 51, 52]
    greedy = SamplingParams(max_tokens=8, temperature=0.0, eos=False)
    [[a], [b]] = sampler.sample([first, second], greedy).result()
    stop = next((token for token in a.tokens if token not in b.tokens), None)
    if stop is None:
        pytest.skip("both say the same")
    [[cut], [whole]] = sampler.sample(
        [first, second], SamplingParams(max_tokens=8, temperature=0.0, eos=False, stop=(stop,))
    ).result()
    assert cut.tokens == a.tokens[: a.tokens.index(stop) + 1]
    assert (cut.stop_reason, whole.stop_reason) == ("stop", "length")
    assert whole.tokens == b.tokens


def test_an_adapter_learns_and_its_sampler_says_the_same(path, batch):
    # peft refuses what mamba's kernels read past the layers; experts that lie in one tensor are not merged.
    mamba = {"falcon_mamba": ("in_proj", "x_proj"), "mamba2": ("in_proj",)}
    targets = mamba.get(path.name, ("q_proj", "o_proj"))
    trainer = LocalEngine(load_model(str(path))).trainer(lora=LoraConfig(rank=4, alpha=8, targets=targets), seed=1)
    losses = []
    for _ in range(4):
        losses.append(trainer.forward_backward(batch, "cross_entropy").result().loss)
        trainer.optim_step(AdamParams(learning_rate=0.02)).result()
    assert losses[-1] < losses[0] - 0.1
    ours = trainer.forward(batch).result().logprobs
    theirs = trainer.sampler().logprobs(ROWS[:-1]).result()
    assert [row[1:] for row in ours[:-1]] == [pytest.approx(row, abs=2e-5) for row in theirs]


def test_heads_likeliest_tokens_and_divergences_need_no_forest(path, plain):
    engine = LocalEngine(load_model(str(path)))
    trainer = engine.trainer(lora=None, head=Head())
    weight = trainer.head_weight()
    trunk = getattr(plain, plain.base_model_prefix)
    with torch.no_grad():
        alone = [trunk(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0, -1] for row in ROWS]
        likeliest = [logits(plain, row)[:-1].argmax(-1).tolist() for row in ROWS]
    assert trainer.scorer().scores(ROWS).result() == pytest.approx([float(weight[0] @ h) for h in alone], abs=1e-5)
    top = engine.sampler().top_logprobs(ROWS, 2).result()
    assert [[place[0][0] for place in row] for row in top] == likeliest
    found = engine.sampler().divergences(trainer.sampler(), ROWS[:3], [1, 1, 1]).result()
    assert [len(row) for row in found] == [8, 4, 1]
    assert all(value == pytest.approx(0, abs=1e-6) for row in found for value in row)


def test_rows_of_like_length_share_a_piece_and_padding_counts(batch):
    pieces = list(padded_micro_batches(batch, 20))
    # Lengths 9 5 2 7 12 6 1: of 1, 2 and 5 three are padded to 15 tokens; 6 and 7 to 14; 9 and 12 would make 24.
    assert pieces == [[6, 2, 1], [5, 3], [0], [4]]
    tied = Batch(batch.data, pairs=((0, 2),))
    assert list(padded_micro_batches(tied, 20)) == [[6, 1, 5], [3], [0, 2], [4]]


CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class Trunk(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, use_cache=None, **_):
        x = self.embedding(input_ids)
        count = torch.arange(1, x.shape[1] + 1)[None, :, None]
        seen = SEEN
        return BaseModelOutput(last_hidden_state=self.mix(torch.cat([x, seen], -1)))


class Model(PreTrainedModel, GenerationMixin):
    config_class = LlamaConfig
    base_model_prefix = "trunk"

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.trunk.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, use_cache=None, **_):
        out = self.trunk(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        return CausalLMOutput(logits=LOGITS)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where transformers copies code that came with a model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


def remote(directory, seen, logits):
    """A model whose config says Llama and whose code, which lies beside it, is something else."""
    tiny_model(directory, hidden=32)
    (directory / "modeling.py").write_text(CODE.replace("SEEN", seen).replace("LOGITS", logits))
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(settings))
    draw = torch.Generator().manual_seed(0)
    shapes = {"trunk.embedding.weight": (512, 32), "trunk.mix.weight": (32, 64), "trunk.mix.bias": (32,)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = torch.randn(512, 32, generator=draw)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


MEAN, LINEAR = "x.cumsum(1) / count", "self.lm_head(out.last_hidden_state)"


@pytest.mark.usefixtures("modules")
def test_code_that_came_with_a_model_is_computed_row_by_row(tmp_path):
    tensors = remote(tmp_path / "mean", MEAN, f"3 * torch.tanh({LINEAR} / 3)")
    loaded = load_model(str(tmp_path / "mean"), trust_remote_code=True)
    assert loaded.why_no_tree == "is computed by code that came with it"
    assert not loaded.plain_head
    found = LocalEngine(loaded).sampler().logprobs(ROWS[:3]).result()
    for row, ours in zip(ROWS, found, strict=False):
        x = tensors["trunk.embedding.weight"][torch.tensor(row)]
        mean = torch.stack([x[: t + 1].mean(0) for t in range(len(row))])
        hidden = torch.cat([x, mean], -1) @ tensors["trunk.mix.weight"].T + tensors["trunk.mix.bias"]
        said = torch.log_softmax(3 * torch.tanh(hidden @ tensors["lm_head.weight"].T / 3), -1)
        assert ours == pytest.approx([float(said[t - 1, row[t]]) for t in range(1, len(row))], abs=1e-4)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("seen", "logits", "reason"),
    [
        ("x.flip(1)", LINEAR, "other numbers beside a longer one"),
        ("(x * attention_mask[..., None]).sum(1, True).expand_as(x)", LINEAR, "lets a token see later ones"),
        (MEAN, f"{LINEAR} + (0 if input_ids is None else 5 * input_ids[..., None])", "do not follow from its last"),
        (MEAN, "out.absent", "cannot compute padded rows either: .*absent"),
    ],
)
def test_what_comes_out_otherwise_beside_others_is_refused_when_it_is_loaded(tmp_path, seen, logits, reason):
    remote(tmp_path / "odd", seen, logits)
    with pytest.raises(ModelError, match=reason):
        load_model(str(tmp_path / "odd"), trust_remote_code=True)


def test_an_encoder_is_refused(tmp_path):
    directory = tiny_model(tmp_path / "bert")
    config = AutoConfig.for_model("bert", **{key: value for key, value in SMALL.items() if "head_dim" not in key})
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    with pytest.raises(ModelError, match="lets a token see later ones"):
        load_model(str(directory))
