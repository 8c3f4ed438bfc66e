"""`--engine tinker`: whole verbs through the SDK against `tercet serve`, beside the same verbs on the local engine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tercet.engine.local import LocalEngine
from tercet.engine.remote import RemoteEngine
from tercet.errors import EngineError
from tercet.types import AdamParams, LoraConfig, SamplingParams
from tests.e2e.commands import MACHINE, CommandLine, measured
from tests.e2e.serve.serving import start

pytestmark = pytest.mark.filterwarnings("ignore")

STAGES = ("sft", "preference", "rl")
# One prompt a step: its answers are then drawn under the same seeds there and here.
SAME = ("held_out_judge=0", "rl.prompts_per_step=1")


@pytest.fixture(scope="module")
def service(server: Any) -> Mapping[str, str]:
    return {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.token}


@pytest.fixture(scope="module")
def there(
    tercet: CommandLine, small: tuple[object, ...], service: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole `tercet rlhf` through the service; look, but change nothing."""
    root = tmp_path_factory.mktemp("there") / "run"
    said = tercet("rlhf", "--engine", "tinker", "--out", root, *small, *SAME, environment=service).out
    assert f"model: tiny, at {service['TINKER_BASE_URL']}" in said and "the weights stay at the service" in said
    return root


def test_the_whole_road_through_a_service_is_the_local_one(
    tercet: CommandLine, small: tuple[object, ...], there: Path, tmp_path: Path
):
    tercet("rlhf", "--out", tmp_path / "here", *small, *SAME)
    for stage in STAGES:
        found, wanted = measured(there / stage), measured(tmp_path / "here" / stage)
        for mine, theirs in zip(wanted, found, strict=True):
            assert mine.keys() - theirs.keys() <= {"entropy"}, stage
            # Later steps of RL may draw another token where two are as likely but for the last digits.
            for name in mine.keys() & theirs.keys() if stage != "rl" or mine["step"] == 0 else ():
                if isinstance(mine[name], float):
                    assert theirs[name] == pytest.approx(mine[name], abs=1e-5), (stage, mine["step"], name)
    evaluation = json.loads((there / "evaluation.json").read_text())
    assert {row["policy"] for row in evaluation["win_rates"]} == {"base", "sft", "rl"}
    assert evaluation["policies"]["sft"]["kl"] == 0
    assert list((there / "rl/checkpoints").glob("*/tinker.json"))
    assert not list(there.rglob("*.safetensors"))


def test_a_run_through_a_service_goes_on_where_it_stood(
    tercet: CommandLine, small: tuple[object, ...], there: Path, service: Any, tmp_path: Path
):
    again = tmp_path / "run"
    shutil.copytree(there, again)
    # As if it had been killed before its last step was saved.
    (again / "rl/done.json").unlink()
    shutil.rmtree(again / "rl/checkpoints/step-000003")
    words = ("rlhf", "--engine", "tinker", "--out", again, *small, *SAME)
    said = tercet(*words, environment=service).out
    assert "preference: done before" in said and "rl: done before" not in said
    for mine, theirs in zip(measured(there / "rl"), measured(again / "rl"), strict=True):
        assert {k: v for k, v in theirs.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in mine.items() if isinstance(v, float)}, abs=1e-5
        )


def test_what_was_trained_at_a_service_is_used_there_and_not_taken_for_a_file(
    tercet: CommandLine, there: Path, service: Any, tmp_path: Path
):
    out = tmp_path / "answers.jsonl"
    said = tercet("generate", "--policy", there, "--rows", 1, "--max-tokens", 4, "--out", out, environment=service).out
    assert f"at {service['TINKER_BASE_URL']}" in said and len(out.read_text().splitlines()) == 1
    assert "keeps the weights as tinker://" in tercet("export", there, "--out", tmp_path / "x", code=2).err


def test_what_a_service_cannot_do_is_said_before_anything_is_done(
    tercet: CommandLine, small: tuple[object, ...], service: Any, tmp_path: Path
):
    words = ("--engine", "tinker", *small, "--out", tmp_path / "run")
    for more, told in (
        ((), "has no heads, so no scalar reward model and no critic: with engine tinker set held_out_judge 0"),
        (("held_out_judge=0", "rl.temperature=0.7"), "rl.temperature and evaluation.temperature must be 1"),
        (("held_out_judge=0", "lora.alpha=16", "--out", tmp_path / "other"), "trains adapters of lora.alpha 32"),
    ):
        assert told in tercet("rlhf", *words, *more, code=2, environment=service).err
    nobody = {**service, "TINKER_API_KEY": ""}
    assert "needs TINKER_API_KEY" in tercet("rlhf", *words, "held_out_judge=0", code=2, environment=nobody).err
    away = {**service, "TINKER_API_KEY": "tml-x"}
    unknown = tercet(
        "sft", "--engine", "tinker", "--model", "smollm2-135m", "--out", tmp_path / "sft", code=1, environment=away
    ).err
    assert "the service has no model 'smollm2-135m'; it has Qwen/Qwen3-8B-Base, tiny" in unknown
    assert not (tmp_path / "run/sft").exists()


def test_a_run_whose_service_is_started_anew_says_so_and_goes_on_when_it_is_run_again(
    tercet: CommandLine, engine: LocalEngine, rows: Any, tmp_path: Path
):
    served, run, steps = tmp_path / "served", tmp_path / "run", 16
    first = start(tercet, served)
    there = RemoteEngine(first.client(), "tiny", engine.language, context_tokens=engine.context_tokens)
    trainer = there.trainer(lora=LoraConfig(rank=4, alpha=32))
    sampler = trainer.sampler()
    words = ("sft", "--engine", "tinker", *MACHINE, "--data", rows.conversations, "--batch-size", 4, "--epochs", 9,
             "--max-steps", steps, "--save-every-steps", 1, "--out", run)  # fmt: skip
    environment = {"TINKER_BASE_URL": first.url, "TINKER_API_KEY": first.token}
    running = tercet.start(*words, environment=environment)
    while not list(run.glob("checkpoints/step-*/tinker.json")):
        assert running.is_running(), running.wait().err
        time.sleep(0.01)
    first.stop()
    second = start(tercet, served, "--port", first.url.rpartition(":")[2])
    ended = running.wait()
    assert ended.code == 1 and "run the same command again" in ended.err and "Traceback" not in ended.err
    adam, params = AdamParams(learning_rate=1e-3), SamplingParams(max_tokens=1)
    # The second time the SDK does not even ask.
    for ask in (lambda: trainer.optim_step(adam),) * 2 + (lambda: sampler.sample([[40]], params),):
        with pytest.raises(EngineError, match="run the same command again"):
            ask().result()
    assert len(measured(run)) < steps
    tercet(*words, environment=environment)
    assert [row["step"] for row in measured(run)] == list(range(steps + 1))
    second.stop()
