"""The local engine on a GPU; skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tercet.engine import graphed, sampler
from tercet.engine.local import LocalEngine
from tercet.models.flex import TOLERANCE, compiled, error_of, works
from tercet.models.load import load_model
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT = list(range(10, 30))
ANSWERS = [list(range(40 + i, 60 + i)) for i in range(4)]
SEQUENCES = [[*PROMPT, *answer] for answer in ANSWERS]


@pytest.fixture(scope="module")
def engines() -> tuple[LocalEngine, LocalEngine]:
    return (
        LocalEngine(load_model("tiny", device="cpu", dtype="float32")),
        LocalEngine(load_model("tiny", device="cuda", dtype="bfloat16")),
    )


def batch() -> Batch:
    return Batch([Datum(s, [0.0] * len(PROMPT) + [1.0] * (len(s) - len(PROMPT))) for s in SEQUENCES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_and_its_gradients_are_a_masked_softmax(dtype: torch.dtype) -> None:
    assert error_of(compiled(), 6, 2, 64, dtype, torch.device("cuda")) < TOLERANCE
    assert works(6, 2, 64, dtype, torch.device("cuda"))


def test_bfloat16_logprobs_on_the_gpu_are_those_of_float32_on_the_cpu(engines: tuple[LocalEngine, LocalEngine]) -> None:
    cpu, gpu = (torch.tensor(engine.sampler().logprobs(SEQUENCES).result()) for engine in engines)
    assert torch.allclose(cpu, gpu, atol=0.05)
    assert not torch.equal(cpu, gpu)


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


def test_steps_as_graphs_draw_what_steps_without_draw(
    engines: tuple[LocalEngine, LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    def record(work: graphed.Work) -> tuple[Callable[[], object], torch.Tensor]:
        made.append(work)
        return graphed.cuda_graph(work)

    params, prompts = SamplingParams(max_tokens=70, temperature=0, eos=False), [PROMPT, PROMPT[:3]]
    monkeypatch.setattr(sampler, "recorder", lambda device: None)
    expected = engines[1].sampler().sample(prompts, params, n=2).result()
    monkeypatch.setattr(sampler, "recorder", lambda device: record)
    found = engines[1].sampler().sample(prompts, params, n=2).result()
    assert len(made) == 3
    assert graphed.recorder(torch.device("cuda")) is graphed.cuda_graph
    for ours, theirs in zip(found, expected, strict=True):
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]


def test_full_training_on_the_gpu_saves_and_loads(engines: tuple[LocalEngine, LocalEngine], tmp_path: Path) -> None:
    trainer = engines[1].trainer()
    trainer.forward_backward(batch(), "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-3)).result()
    weights = trainer.save(tmp_path).result()
    other = engines[1].trainer(init=weights)
    other.load(weights).result()
    assert other.fingerprint() == trainer.fingerprint()
