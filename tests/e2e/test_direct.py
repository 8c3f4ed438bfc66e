"""`tercet dpo` and `tercet kto` on the model `tiny`."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import pytest

from tercet.models.load import load_tokenizer
from tests.e2e.commands import MACHINE, learned, measured, written
from tests.e2e.test_stopped_runs import assert_same, rows_written, stopped

STEPS = 6
ROOT = Path(__file__).parents[2]
AT_START = {"ipo_mean": 25.0, "aot": math.log(2)}


@pytest.fixture(scope="module")
def policy(tercet, rows, tmp_path_factory) -> Path:
    """A policy that learned a little, so that it is not the base."""
    out = tmp_path_factory.mktemp("policy") / "sft"
    tercet("sft", *MACHINE, "--data", rows.conversations, "--max-steps", 2, "--learning-rate", 1e-2, "--out", out)
    return out


@pytest.fixture(scope="module")
def command(policy: Path, rows):
    """Each verb, but for where it writes."""
    often = ("--max-steps", STEPS, "--epochs", 9, "--save-every-steps", 2, "--eval-every-steps", 3)
    start = ("--policy", policy, "--data", rows.comparisons, "--learning-rate", 3e-3, "--warmup-steps", 0)
    return {verb: (verb, *MACHINE, *start, *often) for verb in ("dpo", "kto")}


@pytest.fixture(scope="module")
def undisturbed(tercet, command, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for verb, words in command.items():
        tercet(*words, "--out", folder / verb)
    return {verb: folder / verb for verb in command}


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reference_in_the_making(out: Path) -> bool:
    return any(out.glob("reference.safetensors*"))


MOMENTS = {"while_the_reference_is_computed": reference_in_the_making, "after_1_row": rows_written(1),
           "after_4_rows": rows_written(4)}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_a_killed_run_ends_bit_for_bit_where_it_would_have(tercet, command, undisturbed, tmp_path, verb, moment):
    out = tmp_path / "run"
    assert stopped(tercet, command[verb], out, MOMENTS[moment]).code == -signal.SIGKILL
    before = written(out)
    tercet(*command[verb], "--out", out)
    assert_same(out, undisturbed[verb])
    kept = "reference.safetensors"
    assert (out / kept).read_bytes() == (undisturbed[verb] / kept).read_bytes()
    if kept in before:  # what was computed once is not computed again
        assert written(out)[kept] == before[kept]


@pytest.mark.parametrize("loss", ["ipo_mean", "aot", "simpo", "0.8*sigmoid+0.2*bco+sft"])
def test_another_loss_learns_from_the_policy_on(tercet, policy, rows, tmp_path, loss):
    words = ("--data", rows.comparisons, "--policy", policy, "--max-steps", 2, "--loss", loss)
    tercet("dpo", *MACHINE, *words, "--out", tmp_path / "run")
    first, second, last = steps_of(tmp_path / "run")
    if loss in AT_START:
        assert first["loss"] == pytest.approx(AT_START[loss], rel=1e-5)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["grad_norm"] > 0 and math.isfinite(second["loss"])
    assert 0 <= last["test/rewards/accuracies"] <= 1
    assert (tmp_path / "run/reference.safetensors").exists() == (loss != "simpo")


def test_pairs_are_told_apart_after_a_few_steps(undisturbed):
    rows = steps_of(undisturbed["dpo"])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[5]["loss"] < rows[0]["loss"]
    assert rows[5]["rewards/margins"] > 0 and rows[5]["rewards/accuracies"] > 0.6


def test_kto_lifts_good_answers_above_bad_ones(undisturbed):
    rows = steps_of(undisturbed["kto"])
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5) and rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[5]["rewards/margins"] > rows[0]["rewards/margins"] + 1e-3


def test_the_reference_is_the_policy_at_the_start_and_not_the_base(tercet, command, tmp_path, undisturbed):
    from safetensors.numpy import load_file

    words = [str(word) for word in command["dpo"]]
    words[words.index("--policy") + 1] = "base"
    tercet(*words, "--out", tmp_path / "base")
    of_policy, of_base = (
        load_file(run / "reference.safetensors")["logprobs"] for run in (undisturbed["dpo"], tmp_path / "base")
    )
    assert abs(of_policy - of_base).max() > 0.01
    assert learned(tmp_path / "base") != learned(undisturbed["dpo"])


def test_another_policy_cannot_go_on_with_a_run(tercet, command, tmp_path, undisturbed):
    words = [str(word) for word in command["dpo"]]
    words[words.index("--policy") + 1] = "base"
    assert "policy_sha256" in tercet(*words, "--out", undisturbed["dpo"], code=2).err


def test_a_reference_of_other_rows_is_refused(tercet, command, tmp_path, undisturbed):
    out = tmp_path / "run"
    out.mkdir()
    (out / "reference.safetensors").write_bytes((undisturbed["kto"] / "reference.safetensors").read_bytes())
    assert "was computed for another run (its rows differ)" in tercet(*command["dpo"], "--out", out, code=1).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--loss", "sigmod"), "there is no loss 'sigmod'; there are aot, aot_unpaired"),
        (("--loss", "0.5*sigmoid+aot"), "there is no loss 'aot'"),
        (("--loss", "x*sigmoid"), "a sum is written as"),
        (("--loss", "ipo", "--label-smoothing", 0.1), "the loss ipo has no label_smoothing"),
        (("--beta", 0), "beta is 0.0; it must be above 0"),
        (("--loss", "exo", "--label-smoothing", 0), "exo needs it above 0"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused_at_once(tercet, words, said):
    assert said in tercet("dpo", *MACHINE, *words, code=2).err


def test_kto_learns_labelled_rows(tercet, tmp_path):
    data = tmp_path / "labelled.jsonl"
    rows = [{"prompt": f"Say {i % 4}", "completion": f"{i % 4}" * (1 + i % 2), "label": i % 2 == 0} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", data, "--max-steps", 2, "--rows-per-step", 6)
    said = tercet("kto", *MACHINE, *words, "--out", tmp_path / "run").out
    assert "good answers and" in said
    assert "kl" not in tercet("kto", *MACHINE, *words, "--loss", "apo_zero_unpaired", "--out", tmp_path / "apo").err
    assert all(row["kl"] >= 0 for row in steps_of(tmp_path / "run")[:-1])
    assert all("kl" not in row for row in steps_of(tmp_path / "apo"))


def test_kto_joins_prompts_and_answers_of_others_within_the_models_context(tercet, tmp_path):
    data = tmp_path / "labelled.jsonl"
    tokenizer = load_tokenizer("tiny")
    long = tokenizer.decode(tokenizer("tea " * 700)["input_ids"][:700])  # of the context's 1,024
    rows = [
        {"prompt": f"{i} {'' if i % 2 else long}", "completion": long if i % 2 else "No.", "label": i < 3}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", data, "--max-steps", 1, "--rows-per-step", 5)
    said = tercet("kto", *MACHINE, *words, "--out", tmp_path / "run").out
    assert "left out" not in said
    assert steps_of(tmp_path / "run")[0]["kl"] == pytest.approx(0, abs=1e-2)


def test_kto_on_one_prompt_says_what_is_missing(tercet, tmp_path):
    data = tmp_path / "labelled.jsonl"
    rows = [
        {"prompt": "Hi", "completion": word, "label": word != "No"} for word in ("Hello", "Yes", "No", "Well", "Hm")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("kto", *MACHINE, "--data", data, "--out", tmp_path / "a")
    assert "all 5 begin alike" in tercet(*words, code=1).err
    assert "answers have the same prompt" in tercet(*words, "--test-data", data, code=1).err


def test_every_metric_is_described(undisturbed):
    page = (ROOT / "docs/direct.md").read_text()
    named = set(re.findall(r"`([^`\n]+)`", page.replace("```", "")))
    for run in undisturbed.values():
        found = {key.removeprefix("test/") for row in measured(run) for key in row} - {"step"}
        assert found <= named
