"""Every other verb, on what a finished run left."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import MACHINE, learned, measured

FEW = ("--rows", 3, "--max-tokens", 6, "--threads", 1)


def test_the_program_itself_answers_help_in_less_than_a_second():
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "tercet.cli.main", "rlhf", "--help"], capture_output=True)
    after = os.times()
    assert (done.returncode, done.stderr) == (0, b"")
    # Of the processor's time: the clock on the wall also counts what other tests do meanwhile.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_sft_learns_conversations(tercet, rows, tmp_path: Path):
    words = ("--data", rows.conversations, "--batch-size", 8, "--max-steps", 3, "--out", tmp_path / "run")
    said = tercet("sft", *MACHINE, *words).out
    assert "Held-out NLL, start to end of SFT" in said
    steps = measured(tmp_path / "run")
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert steps[3]["test/nll"] < steps[0]["test/nll"]
    assert (tmp_path / "run/report.html").exists()
    again = tmp_path / "again"
    tercet("sft", "--config", tmp_path / "run/config.yaml", "--out", again)
    assert learned(again) == learned(tmp_path / "run")


def test_preference_learns_comparisons_and_rl_learns_from_its_verdicts(tercet, rows, tmp_path: Path):
    judge, policy, run = (str(tmp_path / name) for name in ("judge", "policy", "run"))
    tercet("preference", *MACHINE, "--data", rows.comparisons, "--max-steps", 2, "--max-length", 900, "--out", judge)
    tercet("sft", *MACHINE, "--data", rows.conversations, "--max-steps", 1, "--out", policy)
    said = tercet(
        "rl", *MACHINE, "--data", rows.comparisons, "--policy", policy, "--judge-model", judge, "--steps", 2,
        "--max-tokens", 6, "evaluation.prompts=3", "evaluation.max_tokens=6", "--out", run,
    ).out  # fmt: skip
    assert f"take it elsewhere  tercet export {run} --out DIRECTORY" in said
    found = json.loads((Path(run) / "evaluation.json").read_text())
    assert {(row["policy"], row["against"]) for row in found["win_rates"]} == {
        ("rl", "start"), ("rl", "chosen"), ("start", "chosen"),
    }  # fmt: skip
    steps = [row for row in measured(Path(run)) if "prompt" not in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert "test/win_rate" in steps[2]
    refused = tercet("rl", "--judge-model", judge, "--policy", policy, code=2).err
    assert "was trained on tiny, and the model is smollm2-135m; give --model tiny" in refused


@pytest.mark.parametrize("settings", [
    ("--judge", "hard"), ("--pattern", "one_way"), ("--chunk", 2), ("--loss", "ppo"), ("--loss", "cispo"),
    ("--substeps", 2), ("--kl-coef", 0.1), ("--scale", "rloo"), ("--temperature", 0.7), ("--eval-every-steps", 0),
], ids=lambda words: "=".join(map(str, words)).strip("-"))  # fmt: skip
def test_rl_takes_a_step_with(tercet, finished: Path, rows, tmp_path: Path, settings):
    tercet(
        "rl", *MACHINE, "--data", rows.comparisons, "--policy", finished / "sft", "--judge-model", finished,
        "--steps", 2, "--prompts-per-step", 2, "--max-tokens", 6, "evaluation.prompts=2", "evaluation.max_tokens=6",
        "evaluation.prompts_while_training=2", *settings, "--out", tmp_path / "run",
    )  # fmt: skip
    steps = [row for row in measured(tmp_path / "run") if "reward" in row and "prompt" not in row]
    assert len(steps) == 2
    assert all(math.isfinite(row[key]) for row in steps for key in ("reward", "loss", "kl", "grad_norm"))
    # The greedy letters of a judge that knows nothing are no verdicts, and equal rewards teach nothing.
    assert (learned(tmp_path / "run") != learned(finished / "sft")) == ("hard" not in settings)


def test_rl_can_start_from_the_base(tercet, finished: Path, rows, tmp_path: Path):
    tercet(
        "rl", *MACHINE, "--data", rows.comparisons, "--judge-model", finished / "preference", "--steps", 1,
        "--max-tokens", 4, "evaluation.prompts=2", "evaluation.max_tokens=4", "--out", tmp_path / "run",
    )  # fmt: skip
    assert (tmp_path / "run/report.html").exists()


def test_eval_says_who_wins_under_both_judges(tercet, finished: Path, tmp_path: Path):
    out = tmp_path / "found.json"
    said = tercet("eval", finished, *FEW, "--out", out).out
    assert "95% interval" in said and "held_out" in said and "KL to baseline" in said
    found = json.loads(out.read_text())
    [rate] = [
        r for r in found["win_rates"] if (r["policy"], r["against"], r["judge"]) == ("policy", "baseline", "held_out")
    ]
    assert 0 <= rate["low"] <= rate["win_rate"] <= rate["high"] <= 1 and rate["n"] == 3
    assert "nothing is overwritten" in tercet("eval", finished, "--out", out, code=2).err


def test_eval_compares_policies_that_are_named(tercet, finished: Path):
    words = ("--policy", finished / "rl", "--baseline", finished / "sft", "--judge-model", finished / "preference")
    assert f"{finished / 'rl'} against {finished / 'sft'} on 3 prompts" in tercet("eval", *words, *FEW).out


def test_eval_of_a_judge_alone_says_how_often_it_is_right(tercet, finished: Path, rows, tmp_path: Path):
    out = tmp_path / "found.json"
    judge = ("--judge-model", finished / "preference", "--data", rows.comparisons)
    said = tercet("eval", *judge, "--threads", 1, "--out", out).out
    assert "verdict flips with the order" in said and "expected calibration error" in said
    assert json.loads(out.read_text())["judges"]["preference"]["n"] == 30


def test_eval_without_a_judge_says_what_is_missing(tercet):
    assert "Give --judge-model RUN" in tercet("eval", "--policy", "base", code=2).err


def test_generate_writes_a_row_for_every_prompt(tercet, finished: Path, rows, tmp_path: Path):
    out = tmp_path / "deep/answers.jsonl"
    words = ("generate", "--policy", finished / "rl", "--data", rows.comparisons, "--n", 2, *FEW)
    assert tercet(*words, "--out", out).out.endswith(f"{out}\n")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 3
    for row in answers:
        assert row["prompt"][-1]["role"] == "user" and len(row["completions"]) == 2
        for each in row["completions"]:
            assert len(each["tokens"]) == len(each["logprobs"]) <= 6
            assert each["stop_reason"] in ("stop", "eos", "length") and isinstance(each["text"], str)
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl"]
    assert "nothing is overwritten" in tercet(*words, "--out", out, code=2).err
    tercet(*words, "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_generate_refuses_a_prompt_that_is_too_long_and_can_leave_it_out(tercet, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi", "long words " * 1500)))
    words = ("generate", "--model", "tiny", "--data", prompts, "--max-tokens", 5, "--out", tmp_path / "out.jsonl")
    assert "prompt 2 has" in tercet(*words, code=1).err
    assert "1 of 2 prompts have more than" in tercet(*words, "--skip-bad-rows").out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_chat_asks_every_policy_each_in_its_own_conversation(tercet, finished: Path):
    greedy = ("chat", finished, "--temperature", 0, "--max-tokens", 5, "--threads", 1)
    said = tercet(*greedy, stdin="Hi\nAnd now?\n/reset\nHi\n/nonsense\n/quit\nnot asked\n").out
    answers = {name: [part.split("\n")[0] for part in said.split(f"{name}> ")[1:]] for name in ("base", "sft", "rl")}
    assert all(len(each) == 3 for each in answers.values())
    # Greedy: after /reset the same line has the same answer.
    assert all(each[0] == each[2] for each in answers.values())
    assert "Every conversation begins anew." in said and "/nonsense is no command" in said


def test_chat_says_when_a_conversation_is_full_and_goes_on(tercet, finished: Path):
    said = tercet("chat", finished / "sft", "--max-tokens", 5, stdin="long words " * 1500 + "\n/reset\nHi\n").out
    assert "begin anew with /reset" in said and "base> " in said and "> " in said.partition("anew.")[2]


def test_chat_with_what_is_no_run_is_refused(tercet, tmp_path: Path):
    assert "is no directory" in tercet("chat", tmp_path / "nothing", code=2).err


def test_preview_shows_conversations_and_comparisons_with_their_tokens(tercet, rows):
    said = tercet("preview", "--model", "tiny").out
    assert "conversations.jsonl" not in said and "builtin (train): messages, 200 rows" in said
    assert "conversations, written by chat_template" in said and "comparisons, written by chat_template" in said
    said = tercet("preview", rows.comparisons, "--model", "tiny", "--rows", 1, "--renderer", "role_colon").out
    assert "==== Completion A ====" in said and "tokens, 1 learned" in said and said.rstrip().endswith("A")
    said = tercet("preview", rows.comparisons, "--model", "tiny", "--kind", "prompts", "--rows", 1).out
    assert "tokens, 0 learned" in said and said.rstrip().endswith("<|im_start|>assistant")


def test_report_is_made_of_a_whole_run_and_of_a_stage(tercet, finished: Path):
    assert tercet("report", finished).out == f"{finished / 'report.html'}\n"
    assert tercet("report", finished / "preference").out == f"{finished / 'preference/report.html'}\n"
    (finished / "preference/report.html").unlink()


def test_report_of_nothing_is_refused(tercet, tmp_path: Path):
    assert "holds no run" in tercet("report", tmp_path, code=2).err


def test_export_writes_an_adapter_and_a_merged_model_that_say_the_same(tercet, finished: Path, tmp_path: Path):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert tercet("export", finished, "--out", tmp_path / "adapter").out == f"{tmp_path / 'adapter'}\n"
    tercet("export", finished, "--out", tmp_path / "merged", "--merged")
    tercet("export", finished / "sft", "--out", tmp_path / "half", "--merged", "--dtype", "bfloat16")
    assert "nothing is overwritten" in tercet("export", finished, "--out", tmp_path / "adapter", code=2).err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokens = tokenizer("Hello, how are you?", return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        ours = merged(tokens).logits.log_softmax(-1)
        settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        if Path(settings["base_model_name_or_path"]).is_dir():
            theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(tokens).logits.log_softmax(-1)
            assert torch.allclose(ours, theirs, atol=1e-4)
    out = tmp_path / "answers.jsonl"
    tercet("generate", "--model", tmp_path / "merged", "--rows", 1, "--max-tokens", 4, "--out", out)
    wanted = tmp_path / "wanted.jsonl"
    tercet("generate", "--policy", finished / "rl", "--rows", 1, "--max-tokens", 4, "--out", wanted)
    rows = [json.loads(path.read_text())["completions"][0] for path in (out, wanted)]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert rows[0]["logprobs"] == pytest.approx(rows[1]["logprobs"], abs=1e-4)


def test_an_exported_adapter_is_a_policy_too(tercet, finished: Path, tmp_path: Path):
    tercet("export", finished, "--out", tmp_path / "adapter")
    for name, policy in (("a", tmp_path / "adapter"), ("b", finished / "rl"), ("c", finished)):
        words = ("--model", "tiny", "--rows", 1, "--max-tokens", 4, "--out", tmp_path / f"{name}.jsonl")
        tercet("generate", "--policy", policy, *words)
    first, second, third = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert first == second == third


def test_bad_data_are_an_error_that_names_file_and_row(tercet, rows, tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    lines = rows.conversations.read_text().splitlines(keepends=True)
    bad.write_text("".join([*lines[:4], '{"messages": [{"role": "user"}]}\n', *lines[4:]]))
    words = ("sft", *MACHINE, "--data", bad, "--max-steps", 1, "--out", tmp_path / "run")
    refused = tercet(*words, code=1).err
    assert f"{bad}:5" in refused and "--skip-bad-rows" in refused and "Traceback" not in refused
    assert "left out 1" in tercet(*words, "--skip-bad-rows").out


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tercet, tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused = tercet("sft", *MACHINE, "--max-steps", 1, "--out", tmp_path / "file/run", code=1).err
    assert refused.startswith("tercet: ") and "Traceback" not in refused
