"""Random forests, computed as a trie and as padded rows: by transformers alone, and by our way for other models.

Nothing of the reference is ours: transformers' modules compute padded rows with a mask, in float64 but for what they
make float32 themselves; adapters are added to the weights; losses are written out; autograd makes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tercet.engine.bodies import HEAD_PARAMETER
from tercet.engine.local import FullTrainer, LocalEngine, LoraTrainer
from tercet.models.load import LoadedModel, load_model
from tercet.models.quiet import quiet
from tercet.models.tiny import tiny_model
from tercet.types import Batch, Datum, Head, LoraConfig

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
LORA = LoraConfig(rank=3, alpha=4.5)
SCALE = 1.5  # alpha / rank


class Rows:
    """What transformers makes of padded rows with weights that are leaves of a graph of its own."""

    def __init__(self, model: Any, leaves: dict[str, torch.Tensor], lora: bool) -> None:
        self.model, self.leaves, self.lora = model, leaves, lora

    def __call__(self, rows: list[list[int]], temperature: float) -> Said:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        out = functional_call(
            self.model, self.weights(), (ids,), {"attention_mask": mask, "output_hidden_states": True}
        )
        distribution = torch.log_softmax(out.logits[:, :-1] / temperature, -1)
        logprobs = distribution.gather(-1, ids[:, 1:, None])[..., 0]
        last = out.hidden_states[-1][range(len(rows)), [len(row) - 1 for row in rows]]
        scores = last @ self.leaves[HEAD_PARAMETER][0]
        return Said(logprobs, -(distribution.exp() * distribution).sum(-1), scores)

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's, with the adapters worked in."""
        if not self.lora:
            return {name: leaf for name, leaf in self.leaves.items() if name != HEAD_PARAMETER}
        found = {}
        for name, a in self.leaves.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                update = SCALE * self.leaves[name.replace("lora_A", "lora_B")] @ a
                module = self.model.get_submodule(layer)
                found[f"{layer}.weight"] = module.weight + (update.T if isinstance(module, Conv1D) else update)
        return found


@dataclass
class Said:
    """Of rows (B, T): log-probs and entropies (B, T - 1) of all tokens but the first, and scores (B,)."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    scores: torch.Tensor


@pytest.fixture(
    scope="module", params=[f"{name} {trained}" for name in sorted(MODELS) for trained in ("whole", "lora")]
)
def made(request, tmp_path_factory):
    """Where a model is, and what is trained of it."""
    model_type, trained = request.param.split()
    directory = tiny_model(tmp_path_factory.mktemp("model"))
    draw = torch.Generator().manual_seed(0)
    with quiet(), torch.random.fork_rng(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type]))
        for parameter in model.parameters():  # biases and norms too, which are 0 and 1 at first
            drawn = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(0.15 * drawn if parameter.dim() > 1 else parameter + 0.3 * drawn)
        model.save_pretrained(directory)
    return directory, LORA if trained == "lora" else None


def trainer_of(loaded: LoadedModel, lora: LoraConfig | None) -> LoraTrainer | FullTrainer:
    """A trainer with a head; an adapter is as if it had learned."""
    trainer = LocalEngine(loaded, micro_batch_tokens=24).trainer(lora=lora, head=Head())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values() if lora else ():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return trainer


@pytest.fixture(scope="module")
def trie(made):
    """A trainer as it is."""
    directory, lora = made
    return trainer_of(load_model(str(directory)), lora)


@pytest.fixture(scope="module")
def padded(made):
    """One of the same weights that computes padded rows, by transformers' own modules and peft's own adapters."""
    directory, lora = made
    loaded = load_model(str(directory))
    loaded.model.set_attn_implementation("eager")
    trainer = trainer_of(replace(loaded, why_no_tree="is computed as rows to compare", plain_head=lora is None), lora)
    for module in loaded.model.modules():
        vars(module).pop("forward", None)  # tercet's own, of adapters, norms and gates
    return trainer


@pytest.fixture(scope="module")
def reference(made, trie):
    """The same weights in transformers."""
    directory, lora = made
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    leaves = {name: p.detach().double().requires_grad_() for name, p in trie.parameters.items()}
    return Rows(model.double().eval().requires_grad_(False), leaves, lora is not None)


@dataclass
class Drawn:
    """A batch in tensors: weights and advantages (B, T - 1) of all tokens but the first."""

    rows: list[list[int]]
    weights: torch.Tensor
    advantages: torch.Tensor
    before: torch.Tensor
    """Log-probs of another policy (B, T - 1), near this one's."""
    pairs: list[tuple[int, int]]
    pair_weights: torch.Tensor
    margins: torch.Tensor

    def batch(self) -> Batch:
        """As a trainer takes it."""

        def stream(values: torch.Tensor, i: int) -> list[float]:
            return [0.0, *values[i, : len(self.rows[i]) - 1].tolist()]

        data = [
            Datum(row, stream(self.weights, i), {
                "advantages": stream(self.advantages, i), "sampling_logprobs": stream(self.before, i),
                "reference_logprobs": stream(self.before, i),
            })
            for i, row in enumerate(self.rows)
        ]  # fmt: skip
        return Batch(data, self.pairs, self.pair_weights.tolist(), {"margins": self.margins.tolist()})

    def token_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (B, T - 1)."""
        return (self.weights * values).sum() / self.weights.sum()

    def pair_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (P,)."""
        return (self.pair_weights * values).sum() / self.pair_weights.sum()


def cross_entropy(said: Said, of: Drawn) -> torch.Tensor:
    return of.token_mean(-said.logprobs)


def importance_sampling_with_entropy_bonus(said: Said, of: Drawn) -> torch.Tensor:
    ratio = torch.exp(said.logprobs - of.before)
    return of.token_mean(-ratio * of.advantages) + of.token_mean(-0.4 * said.entropies)


def ppo(said: Said, of: Drawn) -> torch.Tensor:
    ratio = torch.exp(said.logprobs - of.before)
    kept = torch.clamp(ratio, 0.7, 1.1)
    return of.token_mean(-torch.minimum(ratio * of.advantages, kept * of.advantages))


def dpo(said: Said, of: Drawn) -> torch.Tensor:
    gains = (of.weights * (said.logprobs - of.before)).sum(-1)
    margins = torch.stack([gains[chosen] - gains[rejected] for chosen, rejected in of.pairs])
    return of.pair_mean(torch.log(1 + torch.exp(-0.2 * margins)))


def bradley_terry(said: Said, of: Drawn) -> torch.Tensor:
    chosen, rejected = (torch.stack([said.scores[pair[side]] for pair in of.pairs]) for side in (0, 1))
    verdicts = torch.log(1 + torch.exp(-(chosen - rejected - of.margins)))
    return of.pair_mean(verdicts + 0.05 * (chosen + rejected) ** 2)


LOSSES: dict[Callable[[Said, Drawn], torch.Tensor], list[tuple[str, dict[str, float]]]] = {
    cross_entropy: [("cross_entropy", {})],
    importance_sampling_with_entropy_bonus: [("importance_sampling", {}), ("entropy_bonus", {"coef": 0.4})],
    ppo: [("ppo", {"clip_low": 0.3, "clip_high": 0.1})],
    dpo: [("sigmoid", {"beta": 0.2})],
    bradley_terry: [("bradley_terry", {"center": 0.05})],
}


def rows_of(least_tokens: int, least: int) -> st.SearchStrategy[list[list[int]]]:
    """Of three tokens, so that many begin alike."""
    return st.lists(st.lists(st.integers(0, 2), min_size=least_tokens, max_size=12), min_size=least, max_size=8)


def drawn_with(rows: list[list[int]], seed: int, logprobs: torch.Tensor) -> Drawn:
    draw = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        # Numbers that float32 holds: both sides get the same.
        return torch.rand(shape, generator=draw).double()

    shape = logprobs.shape
    inside = torch.tensor([[t < len(row) - 1 for t in range(shape[1])] for row in rows]).reshape(shape)
    weights = torch.randint(0, 3, shape, generator=draw).double() * inside
    weights[:, 0].clamp_(min=1)  # something of every row is learned
    before = (logprobs + 0.8 * uniform(*shape) - 0.4).float().double()
    firsts = torch.randint(0, len(rows), (3,), generator=draw).tolist()
    pairs = [(i, (i + 1 + k) % len(rows)) for k, i in enumerate(firsts) if (1 + k) % len(rows)]
    return Drawn(
        rows, weights, 2 * uniform(*shape) - 1, before, pairs, 0.5 + uniform(len(pairs)), uniform(len(pairs))
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@settings(max_examples=8, deadline=None)
@given(rows_of(2, 2), st.integers(0, 99), st.sampled_from([4, 128]), st.sampled_from([1.0, 0.7]))
def test_losses_log_probs_and_gradients_of_any_forest_are_those_of_transformers(
    trie, reference, loss, rows, seed, span_tokens, temperature
):
    said = reference(rows, temperature)
    of = drawn_with(rows, seed, said.logprobs.detach())
    wanted = loss(said, of)
    gradients = torch.autograd.grad(wanted, list(reference.leaves.values()), materialize_grads=True)
    trie.optimizer.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tercet.engine.outputs.SPAN_TOKENS", span_tokens)
        results = [
            trie.forward_backward(of.batch(), name, temperature=temperature, **given).result()
            for name, given in LOSSES[loss]
        ]
    assert sum(result.loss for result in results) == pytest.approx(float(wanted.detach()), rel=1e-5, abs=1e-6)
    logprobs = torch.where(of.weights != 0, said.logprobs, 0.0).tolist()
    for result in results:
        if loss is not bradley_terry:
            ours = [row[1:] for row in result.logprobs]
            assert ours == [
                pytest.approx(row[: len(tokens) - 1], abs=2e-5) for row, tokens in zip(logprobs, rows, strict=True)
            ]
            entropy = float(of.token_mean(said.entropies.detach()))
            assert result.metrics.get("entropy", 0.0) == pytest.approx(entropy, abs=2e-5)
    for (name, parameter), expected in zip(trie.parameters.items(), gradients, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_near(found, expected, name)


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    # Of sums of numbers of both signs float32 loses more than of any of them.
    atol = 5e-6 + 3e-5 * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=atol, msg=lambda said: f"{name}: {said}")


@settings(max_examples=12, deadline=None)
@given(rows=rows_of(1, 1), seed=st.integers(0, 99))
def test_losses_log_probs_and_gradients_of_any_forest_are_those_of_padded_rows(trie, padded, rows, seed):
    draw = torch.Generator().manual_seed(seed)
    batch = Batch([
        Datum(row, [0.0, *torch.randint(0, 3, (len(row) - 1,), generator=draw).float().tolist()]) for row in rows
    ])  # fmt: skip
    for trainer in (trie, padded):
        trainer.optimizer.zero_grad()
    ours, theirs = (trainer.forward_backward(batch, "cross_entropy").result() for trainer in (trie, padded))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-7)
    assert ours.logprobs == [pytest.approx(row, abs=2e-5) for row in theirs.logprobs]
    assert ours.metrics == {name: pytest.approx(value, abs=2e-5) for name, value in theirs.metrics.items()}
    for name, parameter in trie.parameters.items():
        other = padded.parameters[name].grad
        assert (parameter.grad is None) == (other is None)
        if other is not None:
            assert_near(parameter.grad, other.double(), name)
