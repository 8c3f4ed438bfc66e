"""The forest against the plain model, one unpadded row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.engine.collate import forest
from tercet.engine.local import LocalEngine
from tercet.engine.outputs import forest_layout
from tercet.models.load import load_model
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams

ROWS = (
    [40, 41, 42, 43, 44, 45], [40, 41, 42, 50, 51], [40, 41], [60, 61, 62, 63, 64, 65, 66, 67, 68], [40, 41, 42, 43],
    [60, 61, 70], [80] * 12, [40, 41, 42, 43, 44, 45],
)  # fmt: skip
SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "pad_token_id",
    "bos_token_id", "eos_token_id",
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2", "llama, untied", "qwen2", "qwen3"])
def path(request, tmp_path_factory):
    architecture, _, untied = request.param.partition(",")
    directory = tmp_path_factory.mktemp("model")
    if architecture.startswith("qwen"):
        return qwen(tiny_model(directory), architecture)
    return tiny_model(directory, architecture, tied=not untied)


def qwen(directory, model_type):
    """A random Qwen in the place of the Llama of that directory, with biases and norms that do something."""
    sizes = {key: value for key, value in AutoConfig.from_pretrained(directory).to_dict().items() if key in SIZES}
    with quiet(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def plain(request, path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=request.param).eval()


@pytest.fixture
def batch():
    return Batch([
        Datum(row, [0.0, *(1.0 + (i + t) % 2 for t in range(len(row) - 1))]) for i, row in enumerate(ROWS)
    ])  # fmt: skip


def reference(model, batch):
    """Log-probs of each row alone, and the loss of the batch, whose gradient is taken."""
    model.zero_grad()
    rows, total = [], 0.0
    for datum in batch.data:
        tokens = torch.tensor([list(datum.tokens)])
        logprobs = torch.log_softmax(model(input_ids=tokens).logits[0, :-1], -1)
        picked = logprobs.gather(-1, tokens[0, 1:, None])[:, 0]
        total = total - (picked * torch.tensor(datum.weights[1:])).sum()
        rows.append([0.0, *picked.tolist()])
    loss = total / sum(datum.weight for datum in batch.data)
    loss.backward()
    return rows, float(loss.detach())


def test_log_probs_and_every_gradient_are_those_of_the_plain_model(path, plain, batch):
    plain.requires_grad_(True)
    rows, loss = reference(plain, batch)
    trainer = LocalEngine(load_model(str(path))).trainer()
    result = trainer.forward_backward(batch, "cross_entropy").result()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.logprobs == [pytest.approx(row, abs=2e-5) for row in rows]
    expected = dict(plain.named_parameters())
    assert expected.keys() == trainer.parameters.keys()
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=2e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")  # peft's own
def test_log_probs_and_every_gradient_of_an_adapter_are_those_of_peft(path, plain, batch, tmp_path):
    engine = LocalEngine(load_model(str(path)))
    trainer = engine.trainer(lora=LoraConfig(rank=4, alpha=8), seed=1)
    for _ in range(2):  # away from the start, where one half is zero
        trainer.forward_backward(batch, "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=0.02)).result()
    trainer.save(tmp_path).result()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=plain.config._attn_implementation).eval()
    adapted = PeftModel.from_pretrained(model, tmp_path, is_trainable=True).eval()
    rows, loss = reference(adapted, batch)
    result = trainer.forward_backward(batch, "cross_entropy").result()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.logprobs == [pytest.approx(row, abs=2e-5) for row in rows]
    expected = {name.replace(".default", ""): p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert expected.keys() == trainer.parameters.keys()
    for name, parameter in trainer.parameters.items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-6)


def test_greedy_samples_are_those_of_the_plain_model(path, plain):
    sampler = LocalEngine(load_model(str(path)), max_rows=3).sampler()
    prompts = [list(row) for row in ROWS[:5]]
    groups = sampler.sample(prompts, SamplingParams(max_tokens=8, temperature=0.0)).result()
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        tokens = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(torch.log_softmax(logits, -1)[token]), abs=1e-5)
            tokens.append(token)


def test_a_packed_neighbour_changes_nothing(path):
    sampler = LocalEngine(load_model(str(path))).sampler()
    alone = [sampler.logprobs([row]).result()[0] for row in ROWS]
    assert sampler.logprobs(ROWS).result() == [pytest.approx(row, abs=1e-5) for row in alone]
    assert sampler.logprobs(ROWS[::-1]).result() == [pytest.approx(row, abs=1e-5) for row in alone[::-1]]


def test_rows_longer_than_a_span_are_cut_right(path, plain):
    trunk = [40 + t % 50 for t in range(300)]
    rows = [[*trunk, 100 + i, *(30 + (t * i) % 60 for t in range(1, 150))] for i in range(1, 4)] + [[30] * 20]
    found = LocalEngine(load_model(str(path))).sampler().logprobs(rows).result()
    for row, ours in zip(rows, found, strict=True):
        tokens = torch.tensor([row])
        with torch.no_grad():
            logprobs = torch.log_softmax(plain(input_ids=tokens).logits[0, :-1], -1)
        assert ours == pytest.approx(logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist(), abs=5e-5)


def attention(query, key, value, sees, scale):
    """Softmax attention by the definition, with every key repeated for its group of heads."""
    groups = query.shape[0] // key.shape[0]
    scores = (query @ key.repeat_interleave(groups, 0).transpose(1, 2)) * scale
    weights = torch.softmax(scores.masked_fill(~sees, -math.inf), -1)
    return weights @ value.repeat_interleave(groups, 0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.integers(1, 9),
)
def test_attention_over_any_forest_is_attention_with_the_tries_mask(monkeypatch, sequences, heads, span_tokens):
    monkeypatch.setattr("tercet.engine.outputs.SPAN_TOKENS", span_tokens)
    packed = forest(sequences)
    n = len(packed.tokens)
    generator = torch.Generator().manual_seed(n)
    shapes = [(heads[0], n, 4), (heads[1], n, 4), (heads[1], n, 4)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_(True) for tensor in ours]
    ends, row = torch.from_numpy(packed.subtree_end), torch.arange(n)
    sees = (row[None, :] <= row[:, None]) & (row[:, None] < ends[None, :])
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    out = forest_layout(packed, torch.device("cpu")).attend(0, *ours, 0.5)
    expected = attention(*theirs, sees, 0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_a_prepared_model_called_without_a_layout_says_so(path):
    with pytest.raises(RuntimeError, match=r"needs a layout; call it through tercet\.engine"):
        load_model(str(path)).model(input_ids=torch.tensor([[40, 41]]))
