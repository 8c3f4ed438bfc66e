"""The other direction: tercet's own seam, driven through the SDK against a service."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tercet.engine.local import LocalEngine
from tercet.engine.remote import RemoteEngine
from tercet.errors import CheckpointError, EngineError
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams, Weights
from tests.e2e.serve.serving import Server

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = LoraConfig(rank=8, alpha=32)
ADAM = AdamParams(learning_rate=1e-2, max_grad_norm=1.0)
GIVEN = Batch([Datum([40, 41, 42, 43], [0.0, 0.0, 1.0, 2.0]), Datum([50, 51, 52], [0.0, 1.0, 0.5])])
DRAWN = Batch([
    Datum([40, 41, 42, 43], [0.0, 0.0, 1, 1], {"sampling_logprobs": [0.0, 0.0, -6.0, -6.5], "advantages": [1.5] * 4}),
    Datum([50, 51, 52], [0.0, 0.0, 2.0], {"sampling_logprobs": [0.0, 0.0, -6.2], "advantages": [-1.0] * 3}),
])  # fmt: skip

PAIRS = Batch(
    [
        replace(d, streams={**d.streams, "reference_logprobs": [0.0, 0.0, -6.2, -6.1][: len(d.tokens)]})
        for d in DRAWN.data
    ],
    [(0, 1)],
    pair_streams={"comparisons": [0.0], "decided": [1.0], "margins": [0.0]},
)


@pytest.fixture(scope="module")
def remote(client: Any, engine: LocalEngine) -> RemoteEngine:
    return RemoteEngine(client, "tiny", engine.language, context_tokens=engine.context_tokens)


@pytest.mark.parametrize(
    ("batch", "loss", "settings"),
    [
        (GIVEN, "cross_entropy", {}),
        (DRAWN, "importance_sampling", {}),
        (DRAWN, "ppo", {"clip_low": 0.05, "clip_high": 0.1}),
        (DRAWN, "cispo", {"ratio_max": 1.1}),
        (DRAWN, "dro", {"beta": 0.2}),
        (PAIRS, "sigmoid", {"beta": 0.3}),
        (PAIRS, "both_orders", {"label_weight": 0.2}),
    ],
    ids=["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "sigmoid", "both_orders"],
)
def test_learning_through_a_service_is_learning_here(
    remote: RemoteEngine, engine: LocalEngine, batch: Batch, loss: str, settings: dict[str, float]
):
    there, here = remote.trainer(lora=LORA, seed=3), engine.trainer(lora=LORA, seed=3)
    for _ in range(2):
        found, wanted = (each.forward_backward(batch, loss, **settings).result() for each in (there, here))
        assert found.loss == pytest.approx(wanted.loss, abs=1e-5)
        assert [p for row in found.logprobs for p in row] == pytest.approx(
            [p for row in wanted.logprobs for p in row], abs=1e-5
        )
        metrics = {name: value for name, value in wanted.metrics.items() if name != "entropy"}
        assert found.metrics == pytest.approx(metrics, abs=1e-5)
        norms = [each.optim_step(ADAM).result().grad_norm for each in (there, here)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert there.forward(GIVEN).result().logprobs[0] == pytest.approx(
        here.forward(GIVEN).result().logprobs[0], abs=1e-5
    )
    assert there.fingerprint() == there.sampler().fingerprint()


def test_sampling_through_a_service_scores_what_it_drew(remote: RemoteEngine, engine: LocalEngine):
    sampler, prompts = remote.sampler(), [[40, 41], [50]]
    params = SamplingParams(max_tokens=6, seed=5, eos=False)
    first, again = (sampler.sample(prompts, params, 2).result() for _ in range(2))
    assert first == again and len({each.tokens for group in first for each in group}) == 4
    for prompt, group in zip(prompts, first, strict=True):
        for each in group:
            assert each.stop_reason == "length" and len(each.tokens) == 6
            [scored] = sampler.logprobs([[*prompt, *each.tokens]], [len(prompt)]).result()
            assert scored == pytest.approx(each.logprobs, abs=1e-5)
    rows = [[40, 41, 42], [50, 51]]
    assert sampler.top_logprobs(rows, 3).result()[0][1][0] == pytest.approx(
        engine.sampler().top_logprobs(rows, 3).result()[0][1][0], abs=1e-5
    )


def test_going_on_from_a_save_equals_never_having_stopped(server: Server, remote: RemoteEngine, tmp_path: Path):
    trainer = remote.trainer(lora=LORA, seed=3)
    trainer.forward_backward(GIVEN, "cross_entropy").result()
    trainer.optim_step(ADAM).result()
    weights = trainer.save(tmp_path / "step-000001").result()
    saved = remote.sampler(weights)
    again = remote.trainer(init=weights)
    again.load(weights).result()
    assert saved.fingerprint() == again.fingerprint() == again.sampler().fingerprint()
    for each in (trainer, again):
        each.forward_backward(GIVEN, "cross_entropy").result()
        each.optim_step(ADAM).result()
    assert trainer.forward(GIVEN).result() == again.forward(GIVEN).result()
    # What goes on is one model at the service, not one of the weights and another of where they stood.
    session = again.client.model_id.partition(":")[0]
    before = len(server.rest().get_session(session).result().training_run_ids)
    further = remote.trainer(init=weights)
    further.load(weights).result()
    further.forward(GIVEN).result()
    assert len(server.rest().get_session(session).result().training_run_ids) == before + 1


def test_what_a_service_cannot_do_is_refused_by_name(remote: RemoteEngine, tmp_path: Path):
    with pytest.raises(EngineError, match="trains adapters of alpha 32"):
        remote.trainer(lora=LoraConfig(rank=8, alpha=16))
    with pytest.raises(CheckpointError, match="names no weights of a Tinker service"):
        remote.sampler(Weights(tmp_path))
    trainer = remote.trainer(lora=LORA)
    with pytest.raises(EngineError, match="needs a head, which these weights lack"):
        trainer.forward_backward(PAIRS, "bradley_terry").result()
    with pytest.raises(EngineError, match="reads entropies, and only log-probs are known here"):
        trainer.forward_backward(GIVEN, "entropy_bonus").result()
    with pytest.raises(EngineError, match="there is no loss 'sigmoyd'"):
        trainer.forward_backward(GIVEN, "sigmoyd").result()
    with pytest.raises(EngineError, match="needs the stream sampling_logprobs, which datum 0 lacks"):
        trainer.forward_backward(GIVEN, "ppo").result()
