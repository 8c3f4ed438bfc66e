"""What `tercet eval` gives to other tools, and takes from other judges, on the model `tiny`.

The tools themselves are asked where they are installed: `TERCET_TOOLS` names Pythons, with a colon between them, that
have alpaca_eval, fastchat (with openai below 1) or lm_eval; the Python of the tests is looked at too.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tercet.evaluation.length_controlled import length_controlled
from tests.e2e.commands import CommandLine
from tests.openai_server import openai_server

SHORT = ("--max-tokens", 6, "--threads", 1)
QUESTIONS = {
    "alpaca-eval": [{"instruction": f"Say {word}.", "dataset": "made"} for word in ("a", "b\u2028c", "d", "e")],
    "mt-bench": [
        {"question_id": 81 + i, "category": category, "turns": [f"Say {category}.", "Again."]}
        for i, category in enumerate(("writing", "math", "stem", "gossip"))
    ],
    "arena-hard": [
        {"uid": f"u{i}", "category": "arena-hard-v0.1", "cluster": "c", "prompt": f"Say {i}."} for i in range(4)
    ],
}


@functools.cache
def python_with(module: str) -> str:
    """The first Python that has a module; the test is skipped where none has."""
    for python in (sys.executable, *filter(None, os.environ.get("TERCET_TOOLS", "").split(":"))):
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        if subprocess.run([python, "-c", code]).returncode == 0:
            return python
    return ""


def use(module: str, *words: object, folder: Path, code: str | None = None, **environment: str) -> str:
    """Run a tool's module, or code that imports it; what it printed."""
    python = python_with(module.split(".")[0])
    if not python:
        pytest.skip(f"wants {module.split('.')[0]}; name a Python that has it in TERCET_TOOLS")
    ran = ("-m", module) if code is None else ("-c", code)
    named = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), **environment}
    named.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, *ran, *map(str, words)],
        cwd=folder, env=named, input="\n", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("questions")
    for name, rows in QUESTIONS.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: folder / f"{name}.jsonl" for name in QUESTIONS}


@pytest.fixture(scope="module")
def exported(tercet: CommandLine, finished: Path, questions, tmp_path_factory) -> Path:
    """The answers of the RL and the SFT policy to every benchmark."""
    folder = tmp_path_factory.mktemp("exported")
    for name, path in questions.items():
        suffix = "json" if name == "alpaca-eval" else "jsonl"
        for policy in ("rl", "sft"):
            out = folder / name / f"{policy}.{suffix}"
            words = ("--export", name, "--policy", finished / policy, "--data", path, "--out", out)
            assert f"answers 4 questions of {name}" in tercet("eval", *words, *SHORT).out
    return folder


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_every_question_is_answered_in_order_under_the_files_name(exported):
    for name, suffix, key in (("alpaca-eval", "json", "instruction"), ("arena-hard", "jsonl", "uid")):
        rows = rows_of(exported / name / f"rl.{suffix}")
        assert [row[key] for row in rows] == [row[key] for row in QUESTIONS[name]]
        assert {row.get("generator", row.get("model")) for row in rows} == {"rl"}
    for row, asked in zip(rows_of(exported / "mt-bench/rl.jsonl"), QUESTIONS["mt-bench"], strict=True):
        assert (row["question_id"], row["model_id"]) == (asked["question_id"], "rl")
        assert len(row["choices"][0]["turns"]) == 2


def test_a_second_turn_is_answered_after_the_first(tercet, questions, tmp_path):
    drawn = ("--model", "tiny", "--policy", "base", "--temperature", 1, "--rows", 1, *SHORT)
    out = tmp_path / "base.jsonl"
    tercet("eval", "--export", "mt-bench", "--data", questions["mt-bench"], *drawn, "--out", out)
    [first, second] = rows_of(out)[0]["choices"][0]["turns"]
    said = QUESTIONS["mt-bench"][0]["turns"]
    dialogue = [
        {"role": role, "content": words}
        for role, words in (("user", said[0]), ("assistant", first), ("user", said[1]))
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": dialogue}) + "\n")
    # The second turn of the first question is drawn with the seed after the first.
    words = ("--data", tmp_path / "p.jsonl", "--n", 1, "--top-p", 1, "--seed", 1)
    tercet("generate", *drawn, *words, "--out", tmp_path / "a.jsonl")
    assert rows_of(tmp_path / "a.jsonl")[0]["completions"][0]["text"] == second


def test_a_killed_export_goes_on_and_ends_as_it_would_have(tercet, finished, tmp_path):
    asked = tmp_path / "q.jsonl"
    asked.write_text("".join(json.dumps({"instruction": f"Say {i}."}) + "\n" for i in range(100)))
    words = ("eval", finished, "--export", "alpaca-eval", "--data", asked, "--max-tokens", 20, "--threads", 1)
    out, part = tmp_path / "rl.json", tmp_path / "rl.json.part"
    started = tercet.start(*words, "--out", out)
    started.stop_when(lambda: part.exists() and part.stat().st_size > 0, signal.SIGKILL)
    assert part.exists() and not out.exists()
    assert "temperature" in tercet(*words, "--temperature", 0.5, "--out", out, code=2).err
    tercet(*words, "--out", out)
    (tmp_path / "whole").mkdir()
    tercet(*words, "--out", tmp_path / "whole/rl.json")
    assert out.read_bytes() == (tmp_path / "whole/rl.json").read_bytes() and not part.exists()


def test_what_makes_no_export_is_refused_before_anything_is_loaded(tercet, finished, questions, tmp_path):
    export = ("eval", "--export", "mt-bench", "--data", questions["mt-bench"])
    assert "Give --out NAME.jsonl" in tercet(*export, code=2).err
    assert "ends in none of .jsonl" in tercet(*export, "--out", tmp_path / "a.json", code=2).err
    assert "judges by itself" in tercet(*export, "--judge", finished, "--out", tmp_path / "a.jsonl", code=2).err
    wrong = ("eval", "--export", "mt-bench", "--data", questions["arena-hard"], "--out", tmp_path / "a.jsonl")
    assert "arena-hard.jsonl:1: 'turns' is missing" in tercet(*wrong, code=1).err


def test_answers_end_where_the_models_context_ends(tercet, finished, tmp_path):
    asked = tmp_path / "q.jsonl"
    rows = [{"question_id": i, "category": "math", "turns": turns} for i, turns in enumerate(
        (["Hi", "long words " * 1500], ["long words " * 1500], ["Hi", "Ho"])
    )]  # fmt: skip
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("eval", "--export", "mt-bench", "--policy", finished / "sft", "--data", asked, *SHORT)
    assert "fills the" in tercet(*words, "--out", tmp_path / "a.jsonl", code=1).err
    said = tercet(*words, "--skip-bad-rows", "--out", tmp_path / "a.jsonl").out
    assert "1 of 3 questions fill" in said
    first, last = (row["choices"][0]["turns"] for row in rows_of(tmp_path / "a.jsonl"))
    assert first[1] == "" and first[0] == last[0]


def answers_in(words: str, a: str, b: str, end: str) -> tuple[str, str]:
    found = re.search(f"{re.escape(a)}(.*?){re.escape(b)}(.*?){re.escape(end)}", words, re.S)
    assert found is not None
    return found[1], found[2]


def test_alpaca_eval_judges_the_files_and_agrees_on_who_won(exported, tmp_path):
    def preferred(first: str, second: str) -> float:
        return 1 / (1 + math.exp((len(second) - len(first)) / 20))

    def judge(words: str) -> dict[str, float]:
        p = preferred(*answers_in(words, "<1>", "</1><2>", "</2>"))
        return {"m": p, "M": 1 - p}

    config = tmp_path / "judge"
    config.mkdir()
    (config / "prompt.txt").write_text("<|im_start|>user\n{instruction}<1>{output_1}</1><2>{output_2}</2>\n<|im_end|>")
    with openai_server(judge) as server:
        settings = {
            "prompt_template": str(config / "prompt.txt"),
            "fn_completions": "openai_completions",
            "completions_kwargs": {
                "model_name": "local", "max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5,
                "price_per_token": 0, "requires_chatml": True,
            },
            "fn_completion_parser": "logprob_parser",
            "completion_parser_kwargs": {
                "numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False,
            },
            "completion_key": "completions_all",
            "batch_size": 1,
        }  # fmt: skip
        (config / "configs.yaml").write_text(json.dumps({"local": settings}))
        use(
            "alpaca_eval.main", "evaluate", "--model_outputs", exported / "alpaca-eval/rl.json",
            "--reference_outputs", exported / "alpaca-eval/sft.json", "--annotators_config", config,
            "--output_path", tmp_path / "found", "--fn_metric", "get_winrate", "--sort_by", "win_rate",
            "--precomputed_leaderboard", "None", "--caching_path", "None",
            folder=tmp_path, OPENAI_API_KEY="none", OPENAI_API_BASE=server.address, IS_ALPACA_EVAL_2="False",
        )  # fmt: skip
    [leaderboard] = tmp_path.glob("found/**/leaderboard.csv")
    names, values = (line.split(",") for line in leaderboard.read_text().splitlines())
    found = dict(zip(names, values, strict=True))
    ours, theirs = (rows_of(exported / f"alpaca-eval/{policy}.json") for policy in ("rl", "sft"))
    pairs = [(a["output"], b["output"]) for a, b in zip(ours, theirs, strict=True)]
    assert (found[""], float(found["n_total"])) == ("rl", len(pairs))
    # The judge takes no side for a place, so the tool's shuffling changes nothing; equal answers are not shown to it.
    wanted = sum(preferred(a, b) for a, b in pairs) / len(pairs)
    assert wanted != pytest.approx(0.5, abs=1e-3)  # or exchanged answers would not show
    assert float(found["win_rate"]) == pytest.approx(100 * wanted, abs=1e-3)
    assert len(server.requests) == sum(a != b for a, b in pairs)


# The tool's own win rate, with its file of difficulties, which it would fetch, replaced by one of the rows given.
LENGTH_CONTROLLED = """
import json, sys
import pandas as pd
from alpaca_eval.metrics import glm_winrate

rows = json.load(open("rows.json"))
known = {"model": "m", "index": range(len(rows)), "instruction_difficulty": [row["difficulty"] for row in rows]}
pd.DataFrame(known).to_csv("df_gamed.csv", index=False)
glm_winrate.hf_hub_download = lambda **_: "df_gamed.csv"
annotations = [{
    "generator_1": "baseline", "output_1": "x" * row["baseline"],
    "generator_2": "policy", "output_2": "x" * row["policy"], "preference": 1 + row["won"],
} for row in rows]
for name in ("length_controlled_minimal", "length_controlled_noreg"):
    found = glm_winrate.get_length_controlled_winrate(annotations, glm_name=name, save_weights_dir=None)
    print("found", found["length_controlled_winrate"])
"""


def test_length_set_aside_the_win_rate_is_alpaca_evals(tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(160):
        policy, baseline, difficulty = rng.randint(150, 600), rng.randint(50, 500), rng.gauss(0.5, 1)
        p = 1 / (1 + math.exp(-(-0.4 + 1.2 * math.tanh((policy - baseline) / 180) + 0.8 * difficulty)))
        won = 0.5 if rng.random() < 0.1 else float(rng.random() < p)
        rows.append({"policy": policy, "baseline": baseline, "difficulty": difficulty, "won": won})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    said = use("alpaca_eval", folder=tmp_path, code=LENGTH_CONTROLLED, IS_ALPACA_EVAL_2="False")
    minimal, difficult = (float(line.split()[1]) / 100 for line in said.splitlines() if line.startswith("found "))
    won, *known = ([row[key] for row in rows] for key in ("won", "policy", "baseline", "difficulty"))
    assert length_controlled(won, *known[:2]).win_rate == pytest.approx(minimal, abs=1e-3)
    assert length_controlled(won, *known).win_rate == pytest.approx(difficult, abs=1e-3)
    # Neither is the win rate itself, nor the other.
    assert abs(minimal - sum(won) / len(won)) > 0.02 and abs(minimal - difficult) > 2e-3


def fastchat_folder(exported: Path, questions: dict[str, Path], folder: Path) -> None:
    """The folders that FastChat's scripts expect, with prompts of our own."""
    data = folder / "data/mt_bench"
    for name in ("model_answer", "reference_answer"):
        (data / name).mkdir(parents=True)
    (data / "question.jsonl").write_bytes(questions["mt-bench"].read_bytes())
    for policy in ("rl", "sft"):
        (data / f"model_answer/{policy}.jsonl").write_bytes((exported / f"mt-bench/{policy}.jsonl").read_bytes())
    # The judge's own answers are the reference for mathematics.
    (data / "reference_answer/gpt-4.jsonl").write_bytes((exported / "mt-bench/sft.jsonl").read_bytes())
    single, both = "{question}<1>{answer}</1>", "{question_1}{question_2}{answer_1}<1>{answer_2}</1>"
    pair = "{question}<1>{answer_a}</1><2>{answer_b}</2>"
    pairs = "{question_1}{question_2}{answer_a_1}{answer_b_1}<1>{answer_a_2}</1><2>{answer_b_2}</2>"
    prompts = [
        {"name": name, "type": kind, "system_prompt": "Judge.", "prompt_template": template, "output_format": form}
        for kind, form, templates in (
            ("single", "[[rating]]", {"single-v1": single, "single-math-v1": single + "{ref_answer_1}",
             "single-v1-multi-turn": both, "single-math-v1-multi-turn": both + "{ref_answer_2}"}),
            ("pairwise", "[[A]]", {"pair-v2": pair, "pair-math-v1": pair + "{ref_answer_1}",
             "pair-v2-multi-turn": pairs, "pair-math-v1-multi-turn": pairs + "{ref_answer_2}"}),
        )
        for name, template in templates.items()
    ]  # fmt: skip
    (folder / "data/judge_prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))


@pytest.mark.parametrize("mode", ["single", "pairwise-all"])
def test_fastchat_grades_both_turns_of_the_files(exported, questions, tmp_path, mode):
    def judge(words: str) -> str:
        if mode == "single":
            [answer] = re.findall("<1>(.*?)</1>", words, re.S)
            return f"So: [[{1 + len(answer) % 10}]]"
        first, second = answers_in(words, "<1>", "</1><2>", "</2>")
        return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"

    fastchat_folder(exported, questions, tmp_path)
    with openai_server(judge) as server:
        tool = {"OPENAI_API_KEY": "none", "OPENAI_API_BASE": server.address}
        use("fastchat.llm_judge.gen_judgment", "--mode", mode, "--model-list", "rl", "sft", folder=tmp_path, **tool)
        shown = use("fastchat.llm_judge.show_result", "--mode", mode, folder=tmp_path)
    name = "single" if mode == "single" else "pair"
    verdicts = rows_of(tmp_path / f"data/mt_bench/model_judgment/gpt-4_{name}.jsonl")
    answers = {
        policy: {
            row["question_id"]: row["choices"][0]["turns"] for row in rows_of(exported / f"mt-bench/{policy}.jsonl")
        }
        for policy in ("rl", "sft")
    }
    assert len(verdicts) == 4 * 2 * (2 if mode == "single" else 1)  # questions, turns, policies
    for row in verdicts:
        turn = row["turn"] - 1
        if mode == "single":
            assert row["score"] == 1 + len(answers[row["model"]][row["question_id"]][turn]) % 10
        else:
            rl, sft = (len(answers[policy][row["question_id"]][turn]) for policy in ("rl", "sft"))
            won = {"rl": rl > sft, "sft": sft > rl}
            wanted = "tie" if rl == sft else "model_1" if won[row["model_1"]] else "model_2"
            assert (row["g1_winner"], row["g2_winner"]) == (wanted, wanted)
    assert "rl" in shown and "sft" in shown


def test_lm_evals_hf_model_reads_an_exported_policy(tercet, finished, tmp_path):
    if not python_with("lm_eval"):
        pytest.skip("wants lm_eval; name a Python that has it in TERCET_TOOLS")
    tercet("export", finished, "--merged", "--out", tmp_path / "policy")
    rows = [("The sky is", " blue", " loud"), ("Two and two are", " four", " green"), ("Fire is", " hot", " seven")]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": q, "choices": [a, b], "answer": 0}) + "\n" for q, a, b in rows)
    )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "made.yaml").write_text(f"""
task: made
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    use(
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'policy'},dtype=float32",
        "--tasks", "made", "--include_path", tasks, "--device", "cpu", "--batch_size", 1,
        "--output_path", tmp_path / "found", "--log_samples", folder=tmp_path,
    )  # fmt: skip
    [found] = tmp_path.glob("found/**/results_*.json")
    accuracy = json.loads(found.read_text())["results"]["made"]["acc,none"]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")

    def logprob(question: str, answer: str) -> float:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, question + answer))
        with torch.no_grad():
            found = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return float(sum(found[t - 1, whole[t]] for t in range(len(prompt), len(whole))))

    assert accuracy == pytest.approx(sum(logprob(q, a) > logprob(q, b) for q, a, b in rows) / 3)


def test_a_judge_behind_an_endpoint_says_who_wins_and_how_good_it_is(tercet, finished, rows, tmp_path):
    def judge(words: str) -> dict[str, float]:
        first, second = answers_in(words, "==== Answer A ====", "==== Answer B ====", "==== End ====")
        return {"A": 0.9, "B": 0.1} if len(first) > len(second) else {"A": 0.1, "B": 0.9}

    few = ("--rows", 3, *SHORT)
    with openai_server(judge) as server:
        judged = ("eval", "--judge", server.address, "--endpoint-model", "local")
        tercet(*judged, "--data", rows.comparisons, "--threads", 1, "--out", tmp_path / "judge.json")
        policies = ("--policy", finished / "rl", "--baseline", finished / "sft")
        said = tercet(*judged, *policies, "--held-out-judge", finished / "judge", *few, "--out", tmp_path / "e.json")
    pairs = [json.loads(line) for line in rows.comparisons.read_text().splitlines()]
    found = json.loads((tmp_path / "judge.json").read_text())["judges"]["preference"]
    longer = [len(text(row["chosen"])) > len(text(row["rejected"])) for row in pairs]
    assert found["n"] == len(pairs) and found["accuracy_both"] == pytest.approx(sum(longer) / len(longer))
    assert "equal length" in said.out
    rates = json.loads((tmp_path / "e.json").read_text())
    samples = [each["answers"] for each in rates["samples"]]
    # Of answers of one length the judge prefers whatever stands second: a tie over both orders.
    won = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in ((s["policy"], s["baseline"]) for s in samples)]
    for row in rates["win_rates"]:
        if row["against"] == "baseline":
            assert 0 <= row["lc_win_rate"] <= 1 and row["lc_stderr"] >= 0
            if row["judge"] == "preference":
                assert row["win_rate"] == pytest.approx(sum(won) / 3)


def text(answer: object) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def test_a_reward_model_judges_under_the_same_name(tercet, finished, rows, tmp_path):
    words = ("--judge", finished / "judge", "--data", rows.comparisons, "--threads", 1, "--out", tmp_path / "a.json")
    tercet("eval", *words)
    # What has no places to prefer never flips.
    assert json.loads((tmp_path / "a.json").read_text())["judges"]["preference"]["flip_rate"] == 0


def test_an_address_without_a_models_name_and_two_judges_are_refused(tercet, finished):
    assert "Give --endpoint-model NAME" in tercet("eval", "--judge", "http://localhost:1/v1", code=2).err
    assert "two names of one setting" in tercet("eval", "--judge", "a", "--judge-model", "b", code=2).err
