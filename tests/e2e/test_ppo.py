"""`tercet reward`, `tercet ppo` and their example, from rows to a policy."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import MACHINE, CommandLine, learned, measured

EXAMPLE = Path(__file__).parents[2] / "examples/ppo_loop.py"
DOCS = (Path(__file__).parents[2] / "docs/ppo.md").read_text()
SMALL = (
    "--steps", 3, "--prompts-per-step", 4, "--mini-batch-size", 2, "--ppo-epochs", 2, "--max-tokens", 6,
    "--save-every-steps", 1, "evaluation.prompts=3", "evaluation.prompts_while_training=2", "evaluation.max_tokens=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def reward_run(tercet: CommandLine, rows, tmp_path_factory) -> Path:
    """A reward model, its scores normalised; look, but change nothing."""
    run = tmp_path_factory.mktemp("reward") / "run"
    tercet(
        "reward", *MACHINE, "--data", rows.comparisons, "--pairs-per-step", 2, "--max-steps", 3, "--k-wise",
        "--normalise-on", "base", "--normalise-answers", 6, "--normalise-max-tokens", 6, "--out", run,
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def ppo_run(tercet: CommandLine, rows, reward_run: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ppo") / "run"
    tercet(
        "ppo", *MACHINE, "--data", rows.comparisons, "--reward.model", reward_run, "--judge-model", reward_run,
        *SMALL, "--out", run,
    )  # fmt: skip
    return run


def test_reward_learns_and_records_how_its_scores_are_normalised(reward_run: Path):
    steps = measured(reward_run)
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert {"loss", "accuracy", "score_gap", "score"} <= steps[0].keys()
    assert {"test/nll", "test/accuracy", "test/ece", "test/accuracy_short_chosen"} <= steps[3].keys()
    found = json.loads((reward_run / "normalisation.json").read_text())
    assert found["policy"] == "base" and found["answers"] == 6 and found["std"] > 0


def test_ppo_learns_from_the_scores_and_compares_the_policies(ppo_run: Path):
    steps = [row for row in measured(ppo_run) if "prompt" not in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert all(math.isfinite(row[key]) for row in steps[:3] for key in ("objective/kl", "ppo/loss/total"))
    assert steps[0]["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert {"test/score", "test/score_gain", "test/win_rate", "test/held_out/win_rate"} <= steps[3].keys()
    found = json.loads((ppo_run / "evaluation.json").read_text())
    assert {"score", "score_std", "kl"} <= found["policies"]["rl"].keys()
    assert (ppo_run / "report.html").exists()


def test_every_metric_of_ppo_is_described_and_no_other(ppo_run: Path):
    table = DOCS[DOCS.index("## What it tells") : DOCS.index("## Score, end and scale")]
    described = set(re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE))))
    lines = (ppo_run / "metrics.jsonl").read_text().splitlines()
    assert described == {key for line in lines for key in json.loads(line)} - {"step"}


def test_ppo_killed_and_started_again_ends_with_the_same_weights(tercet, rows, reward_run: Path, tmp_path: Path):
    words = ("ppo", *MACHINE, "--data", rows.comparisons, "--reward.model", reward_run, *SMALL, "--critic", "separate")
    tercet(*words, "--out", tmp_path / "straight")
    run = tmp_path / "killed"
    started = tercet.start(*words, "--out", run)
    started.stop_when(lambda: (run / "checkpoints/step-000001").exists(), 9)
    tercet(*words, "--out", run)
    assert learned(run) == learned(tmp_path / "straight")
    assert measured(run) == measured(tmp_path / "straight")


def test_a_reward_may_be_a_function_and_none_is_an_error(tercet, rows, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def brief(prompts, completions, chosen):\n    return [-len(c) for c in completions]\n"
    )
    function = (
        "--reward.function",
        f"{tmp_path}/mine.py:brief",
        "--reward.shows",
        "text",
        "reward.weights.function=0.1",
    )
    tercet("ppo", *MACHINE, "--data", rows.comparisons, *function, *SMALL, "--out", tmp_path / "run")
    samples = [row for row in measured(tmp_path / "run") if "prompt" in row]
    assert all(row["reward"] == pytest.approx(-0.1 * len(row["completion"])) for row in samples)
    refused = tercet("ppo", *MACHINE, "--out", tmp_path / "none", code=2).err
    assert "there is nothing to learn from" in refused and not (tmp_path / "none").exists()


def test_a_reward_model_and_a_policy_are_exported_as_what_they_are(tercet, reward_run, ppo_run, tmp_path: Path):
    tercet("export", reward_run, "--merged", "--out", tmp_path / "classifier")
    tercet("export", ppo_run, "--merged", "--out", tmp_path / "policy")
    tercet("export", ppo_run, "--out", tmp_path / "adapter")
    kinds = [
        json.loads((tmp_path / name / "config.json").read_text())["architectures"] for name in ("classifier", "policy")
    ]
    assert kinds == [["LlamaForSequenceClassification"], ["LlamaForCausalLM"]]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_example_trains_a_reward_model_and_takes_its_steps():
    assert len(EXAMPLE.read_text().splitlines()) < 80
    command = [sys.executable, str(EXAMPLE), "--model", "tiny", "--judge-steps", "3", "--max-tokens", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kl = [float(found) for found in re.findall(r"ppo/kl (\S+)", done.stdout)]
    assert len(kl) == 2 and kl[0] == pytest.approx(0, abs=1e-4) and kl[1] != 0
    assert "held-out accuracy" in done.stdout


def test_rlhf_learns_from_a_scalar_reward_model_when_asked(tercet, small, tmp_path: Path):
    root = tmp_path / "run"
    tercet(
        "rlhf", *small, "--policy.algorithm", "ppo", "reward.pairs_per_step=2", "reward.max_steps=3", "ppo.steps=2",
        f"ppo.data={small_data(small)}", "ppo.prompts_per_step=4", "ppo.mini_batch_size=2", "ppo.ppo_epochs=1",
        "ppo.max_tokens=8", "--out", root,
    )  # fmt: skip
    found = json.loads((root / "evaluation.json").read_text())
    assert set(found["policies"]) == {"base", "sft", "rl"} and set(found["judges"]) == {"preference", "held_out"}
    assert "score_gap" in measured(root / "preference")[0] and "score_gap" not in measured(root / "judge")[0]
    assert "objective/kl" in measured(root / "rl")[0]
    before = learned(root / "rl")
    tercet("rlhf", "--config", root / "config.yaml", "--out", root)
    assert learned(root / "rl") == before


def small_data(small) -> str:
    """The comparisons that the small pipeline learns."""
    return next(str(word).partition("=")[2] for word in small if str(word).startswith("rl.data="))
