"""The local engine on a GPU; skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tercet.engine import graphed, sampler
from tercet.engine.local import FullTrainer, LocalEngine, LoraTrainer
from tercet.models.flex import TOLERANCE, compiled, error_of, works
from tercet.models.load import load_model
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT = list(range(10, 30))
ANSWERS = [list(range(40 + i, 60 + i)) for i in range(4)]
SEQUENCES = [[*PROMPT, *answer] for answer in ANSWERS]
ADAPTERS = [LoraConfig(rank=4), None]


@pytest.fixture(autouse=True)
def graphs_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "_FAILED", [])


@pytest.fixture(scope="module")
def engines() -> tuple[LocalEngine, LocalEngine]:
    return (
        LocalEngine(load_model("tiny", device="cpu", dtype="float32")),
        LocalEngine(load_model("tiny", device="cuda", dtype="bfloat16")),
    )


def batch() -> Batch:
    return Batch([Datum(s, [0.0] * len(PROMPT) + [1.0] * (len(s) - len(PROMPT))) for s in SEQUENCES])


def forest(prompts: int, answers: int) -> Batch:
    """Random sequences of prompts with several answers each, of many lengths, one of them more than a block long."""
    draw = torch.Generator().manual_seed(prompts)

    def drawn(least: int, most: int) -> list[int]:
        n = int(torch.randint(least, most, (1,), generator=draw))
        return torch.randint(3, 400, (n,), generator=draw).tolist()

    data = []
    for i in range(prompts):
        prompt = drawn(130, 150) if i == 0 else drawn(2, 60)
        for _ in range(answers):
            answer = drawn(1, 50)
            weights = torch.rand(len(answer), generator=draw).add(0.1).tolist()
            data.append(Datum([*prompt, *answer], [0.0] * len(prompt) + weights))
    return Batch(data)


@torch.no_grad()
def fill(trainer: LoraTrainer | FullTrainer) -> None:
    """The same random weights everywhere, of which neither half of an adapter is zero."""
    draw = torch.Generator().manual_seed(0)
    for _, parameter in sorted(trainer.parameters.items()):
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def gradients(trainer: LoraTrainer | FullTrainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.double().cpu() for name, p in trainer.parameters.items() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """How far the worst of some gradients is off, of its length; those of numbers near 0 by the longest one's."""
    assert found.keys() == wanted.keys()
    least = 1e-3 * max(float(each.norm()) for each in wanted.values())
    return max(float((found[n] - each).norm()) / max(float(each.norm()), least) for n, each in wanted.items())


# Torch takes another kernel for rows under 128 tokens whose query heads are a power of two times the key heads, and n
# is a third of a row.
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("n", [13, 100, 300])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_and_its_gradients_are_a_masked_softmax(
    dtype: torch.dtype, heads: int, kv_heads: int, n: int, gradient: bool
) -> None:
    with torch.set_grad_enabled(gradient):
        assert error_of(compiled(), heads, kv_heads, 64, dtype, torch.device("cuda"), n) < TOLERANCE


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_passes_its_trial(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    assert works(heads, kv_heads, 64, dtype, torch.device("cuda"))


def test_bfloat16_logprobs_on_the_gpu_are_those_of_float32_on_the_cpu(engines: tuple[LocalEngine, LocalEngine]) -> None:
    cpu, gpu = (torch.tensor(engine.sampler().logprobs(SEQUENCES).result()) for engine in engines)
    # On a CPU bfloat16 is off by 0.0024 here.
    assert torch.allclose(cpu, gpu, atol=0.01)
    assert not torch.equal(cpu, gpu)


@pytest.mark.parametrize("lora", ADAPTERS)
def test_the_gradient_of_a_forest_on_the_gpu_is_that_of_the_cpu(lora: LoraConfig | None) -> None:
    found = []
    for device in ("cpu", "cuda"):
        # A third of the forest at a time.
        engine = LocalEngine(load_model("tiny", device=device, dtype="float32"), micro_batch_tokens=400)
        trainer = engine.trainer(lora=lora, seed=1)
        if lora is not None:
            fill(trainer)
        result = trainer.forward_backward(forest(5, 4), "cross_entropy").result()
        found.append((result.loss, gradients(trainer)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert apart(found[1][1], found[0][1]) < 1e-3


class Full:
    """A memory of the GPU that holds so many tokens in a layer; more of them ask for all there is and more."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.failures = tokens, 0

    def forward(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[1] > self.tokens:
            self.failures += 1
            torch.empty(2 * torch.cuda.get_device_properties("cuda").total_memory, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("lora", ADAPTERS)
def test_memory_of_the_gpu_that_runs_out_halves_the_pieces_and_the_gradient_is_the_same(
    lora: LoraConfig | None,
) -> None:
    found, memory = [], Full(300)
    for tokens in (300, 2048):
        engine = LocalEngine(load_model("tiny", device="cuda", dtype="float32"), micro_batch_tokens=tokens)
        trainer = engine.trainer(lora=lora, seed=1)
        if lora is not None:
            fill(trainer)
        trainer.body().trunk.get_submodule("layers.1").register_forward_pre_hook(memory.forward)
        result = trainer.forward_backward(forest(5, 4), "cross_entropy").result()
        found.append((result.loss, gradients(trainer)))
    assert memory.failures == 2
    assert engine.budgets.micro_batch_tokens == 256
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert apart(found[1][1], found[0][1]) < 1e-3


def test_adapters_stay_float32_and_learn_in_small_steps(engines: tuple[LocalEngine, LocalEngine]) -> None:
    trainer = engines[1].trainer(lora=LoraConfig(rank=4), seed=0)
    first = trainer.forward_backward(batch(), "cross_entropy").result().loss
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.optim_step(AdamParams(learning_rate=3e-7)).result()
    moved = [n for n, p in trainer.parameters.items() if "lora_B" in n and not torch.equal(p, before[n])]
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    assert len(moved) == sum("lora_B" in n for n in trainer.parameters)
    for _ in range(20):
        trainer.forward_backward(batch(), "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert trainer.forward_backward(batch(), "cross_entropy").result().loss < first - 0.5


def test_a_sampler_on_the_gpu_scores_what_it_drew(engines: tuple[LocalEngine, LocalEngine]) -> None:
    sampler = engines[1].sampler()
    drawn = sampler.sample([PROMPT], SamplingParams(max_tokens=8, seed=3), n=4).result()[0]
    scored = sampler.logprobs([[*PROMPT, *c.tokens] for c in drawn], [len(PROMPT)] * 4).result()
    for completion, row in zip(drawn, scored, strict=True):
        assert list(completion.logprobs) == pytest.approx(row, abs=0.05)


@pytest.mark.parametrize("prompts", [[PROMPT, PROMPT[:3]], [4 * PROMPT, PROMPT[:3]]], ids=["one block", "two blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_as_graphs_draw_what_steps_without_draw(
    dtype: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    def record(work: graphed.Work) -> tuple[Callable[[], object], torch.Tensor]:
        made.append(work)
        return graphed.cuda_graph(torch.device("cuda"), work)

    engine = LocalEngine(load_model("tiny", device="cuda", dtype=dtype))
    params = SamplingParams(max_tokens=70, temperature=0, eos=False)
    monkeypatch.setattr(sampler, "recorder", lambda device: None)
    expected = engine.sampler().sample(prompts, params, n=2).result()
    # A sampler on the GPU records unasked; here it is watched.
    assert graphed.recorder(torch.device("cuda")) is not None
    monkeypatch.setattr(sampler, "recorder", lambda device: record)
    found = engine.sampler().sample(prompts, params, n=2).result()
    assert len(made) == 3
    assert not graphed.given_up()
    # In bfloat16 the two likeliest tokens may be closer than rounding.
    places = 70 if dtype == "float32" else 1
    for ours, theirs in zip(found, expected, strict=True):
        assert [c.tokens[:places] for c in ours] == [c.tokens[:places] for c in theirs]


def test_full_training_on_the_gpu_saves_and_loads(engines: tuple[LocalEngine, LocalEngine], tmp_path: Path) -> None:
    trainer = engines[1].trainer()
    trainer.forward_backward(batch(), "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-3)).result()
    weights = trainer.save(tmp_path).result()
    other = engines[1].trainer(init=weights)
    other.load(weights).result()
    assert other.fingerprint() == trainer.fingerprint()
