"""The four parts, each by itself and together, on the model `tiny`."""

from __future__ import annotations

import json
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tercet.data.files import read_file
from tests.e2e.commands import MACHINE, learned, measured
from tests.e2e.test_stopped_runs import assert_same, rows_written

ROOT = Path(__file__).parents[2]
LONGER = 'def longer(prompts, completions):\n    return [len(each[-1]["content"]) / 10 for each in completions]\n'


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "taste.py"
    path.write_text(LONGER)
    return f"{path}:longer"


@pytest.fixture(scope="module")
def answers(tercet, finished: Path, rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    words = ("--policy", finished / "sft", "--data", rows.comparisons, "--rows", 20, "--n", 3, "--max-tokens", 6)
    tercet("generate", *words, "--threads", 1, "--out", out)
    return out


@pytest.fixture(scope="module")
def command(finished: Path, rows, reward):
    """Two iterations, but for where they are written."""
    return (
        "rebel", *MACHINE, "--policy", finished / "sft", "--data", rows.comparisons, "--reward.function", reward,
        "--iterations", 2, "--shards", 2, "--kl-coef", 0.1, "--eta", 2, "--pairs-per-step", 4, "--learning-rate", 3e-3,
        "--warmup-steps", 0, "--save-every-steps", 1,
        "answers.n=3", "answers.max_tokens=6", "selection.drop_unfinished=false",
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tercet, command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "rebel"
    tercet(*command, "--out", out)
    return out


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_file(path)]


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_generated_answers_bring_ids_log_probs_and_why_they_stopped(answers):
    found = rows_of(answers)
    assert len(found) == 20
    for row in found:
        assert row["prompt_tokens"] and len(row["completions"]) == 3
        assert len({tuple(each["tokens"]) for each in row["completions"]}) > 1
        for each in row["completions"]:
            assert len(each["tokens"]) == len(each["logprobs"]) and each["stop_reason"] in ("stop", "eos", "length")


def test_scores_keep_the_order_and_everything_else(tercet, answers, reward, tmp_path):
    words = ("score", "--data", answers, "--reward.function", reward)
    tercet(*words, "--out", tmp_path / "scored.jsonl")
    for before, after in zip(rows_of(answers), rows_of(tmp_path / "scored.jsonl"), strict=True):
        for a, b in zip(before["completions"], after["completions"], strict=True):
            assert b == {**a, "reward": len(a["text"]) / 10}
    tercet(*words, "--out", tmp_path / "scored.parquet", "--columns", "published")
    first = rows_of(tmp_path / "scored.parquet")[0]
    assert {"prompt", "response_0", "response_2", "response_0_reward", "response_2_tokens"} <= first.keys()
    assert "nothing is overwritten" in tercet(*words, "--out", tmp_path / "scored.jsonl", code=2).err


def test_a_judges_tournament_scores_groups_that_sum_to_nothing(tercet, answers, finished, tmp_path):
    out = tmp_path / "scored.jsonl"
    tercet("score", "--data", answers, "--reward.tournament", finished, "--threads", 1, "--out", out)
    for row in rows_of(out):
        assert sum(each["reward"] for each in row["completions"]) == pytest.approx(0, abs=1e-6)


def test_nothing_to_score_with_is_said(tercet, answers, tmp_path):
    assert (
        "there is nothing to learn from"
        in tercet("score", "--data", answers, "--out", tmp_path / "a.jsonl", code=2).err
    )


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_killed_file_goes_on_and_ends_as_it_would_have(tercet, answers, finished, rows, reward, tmp_path, verb):
    if verb == "generate":  # 64 prompts are a part
        words = ("generate", "--policy", finished / "sft", "--rows", 130, "--n", 2, "--max-tokens", 30, "--threads", 1)
    else:
        words = ("score", "--data", answers, "--reward.tournament", finished, "--threads", 1)
    out, part = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.part"
    started = tercet.start(*words, "--out", out)
    started.stop_when(lambda: part.exists() and part.stat().st_size > 0, signal.SIGKILL)
    assert part.exists() and not out.exists()
    tercet(*words, "--out", out)
    tercet(*words, "--out", tmp_path / "wanted.jsonl")
    assert out.read_bytes() == (tmp_path / "wanted.jsonl").read_bytes() and not part.exists()


def test_pairs_keep_the_sampled_ids_and_the_account_says_what_was_left_out(tercet, answers, reward, tmp_path):
    scored = tmp_path / "scored.parquet"
    tercet("score", "--data", answers, "--reward.function", reward, "--columns", "published", "--out", scored)
    said = tercet("prepare", "--data", scored, "--out", tmp_path / "finished", code=0 if _some_ended(answers) else 1)
    assert "answers that were cut off" in said.out + said.err
    words = ("prepare", "--data", scored, "--no-drop-unfinished", "--max-answer-length", 6)
    tercet(*words, "--out", tmp_path / "pairs")
    ids = {tuple(each["tokens"]) for row in rows_of(answers) for each in row["completions"]}
    pairs = rows_of(tmp_path / "pairs/train.jsonl") + rows_of(tmp_path / "pairs/test.jsonl")
    for pair in pairs:
        assert {tuple(pair["chosen_tokens"]), tuple(pair["reject_tokens"])} <= ids
        assert pair["chosen_reward"] >= pair["reject_reward"]
    assert "left_out:" in (tmp_path / "pairs/prepared.yaml").read_text()


def _some_ended(answers: Path) -> bool:
    return any(sum(each["stop_reason"] != "length" for each in row["completions"]) > 1 for row in rows_of(answers))


def test_answers_as_text_alone_get_tokens_of_the_model_that_is_named(tercet, tmp_path):
    data = tmp_path / "published.jsonl"
    rows = [
        {"prompt": f"{i}?", "response_0": f"No {i}.", "response_1": f"Yes {i}!", "response_0_reward": 0.1,
         "response_1_reward": 0.2 + i} for i in range(12)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "give --model" in tercet("prepare", "--data", data, "--out", tmp_path / "pairs", code=2).err
    tercet("prepare", "--data", data, "--model", "tiny", "--kind", "parquet", "--out", tmp_path / "pairs")
    assert {"chosen_tokens", "reject_tokens", "prompt_tokens"} <= rows_of(tmp_path / "pairs/train.parquet")[0].keys()
    run = tmp_path / "run"
    tercet("rebel", *MACHINE, "--prepared", tmp_path / "pairs", "--max-steps", 2, "--out", run)
    first = steps_of(run)[0]
    # The policy is its own reference: what it predicts is 0, and the published loss the square of the gap.
    assert first["predicted_gap"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(first["scaled_loss"]) and first["loss"] >= first["reward_gap"] ** 2


def test_pairs_are_learned_at_the_temperature_their_answers_were_drawn_at(tercet, finished, rows, reward, tmp_path):
    answers, scored, pairs = (tmp_path / name for name in ("answers.jsonl", "scored.parquet", "pairs"))
    words = ("--policy", finished / "sft", "--data", rows.comparisons, "--rows", 4, "--n", 2, "--max-tokens", 6)
    tercet("generate", *words, "--threads", 1, "--temperature", 1, "--out", answers)
    tercet("score", "--data", answers, "--reward.function", reward, "--columns", "published", "--out", scored)
    tercet("prepare", "--data", scored, "--no-drop-unfinished", "--out", pairs)
    learn = ("rebel", *MACHINE, "--policy", finished / "sft", "--max-steps", 1, "--out", tmp_path / "run")
    for place in (pairs, pairs / "train.jsonl"):
        said = tercet(*learn, "--prepared", place, code=2).err
        assert "drawn at temperature 1.0" in said and "taken at 0.8" in said and "give --temperature 1.0" in said
    tercet(*learn, "--prepared", pairs, "--temperature", 1)


def test_answers_are_capped_at_half_the_context_and_it_is_said(tercet, reward, rows, tmp_path):
    words = ("--data", rows.comparisons, "--reward.function", reward, "answers.max_tokens=600")
    ended = tercet("rebel", *MACHINE, *words, "selection.max_prompt_length=1", "--out", tmp_path / "run", code=1)
    assert "the model takes 1024 tokens: answers end at 512, not at 600" in ended.out


def test_the_best_answers_are_rows_to_fine_tune_on(tercet, answers, reward, tmp_path):
    scored, best = tmp_path / "scored.jsonl", tmp_path / "best"
    tercet("score", "--data", answers, "--reward.function", reward, "--out", scored)
    tercet("prepare", "--data", scored, "--select", "best", "--no-drop-unfinished", "--out", best)
    for row in rows_of(best / "train.jsonl"):
        assert [turn["role"] for turn in row["messages"]][-2:] == ["user", "assistant"]
    tercet("sft", *MACHINE, "--data", best, "--max-steps", 1, "--out", tmp_path / "run")


def test_answers_without_words_stop_no_part(tercet, answers, reward, tmp_path):
    groups = rows_of(answers)
    for row in groups:
        row["completions"][0]["text"] = ""
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    scored = tmp_path / "scored.parquet"
    words = ("--reward.function", reward, "--columns", "published")
    tercet("score", "--data", tmp_path / "answers.jsonl", *words, "--out", scored)
    for name, select in (("pairs", ()), ("best", ("--select", "best", "--top-k", 3))):
        words = ("--data", scored, *select, "--no-drop-unfinished", "--kind", "parquet")
        tercet("prepare", *words, "--out", tmp_path / name)
    assert all(row["reject"] == "" for row in rows_of(tmp_path / "pairs/train.parquet"))
    tercet("rebel", *MACHINE, "--prepared", tmp_path / "pairs", "--max-steps", 1, "--out", tmp_path / "rebel")
    tercet("dpo", *MACHINE, "--data", tmp_path / "pairs", "--max-steps", 1, "--out", tmp_path / "dpo")
    tercet("sft", *MACHINE, "--data", tmp_path / "best", "--max-steps", 1, "--out", tmp_path / "sft")


def test_every_iteration_has_its_own_prompts_and_the_last_policy(undisturbed, finished):
    first, second = (undisturbed / f"iteration-{i}" for i in (1, 2))
    asked = [{json.dumps(row["prompt"]) for row in rows_of(each / "answers.jsonl")} for each in (first, second)]
    assert len(asked[0]) == len(asked[1]) == 15 and not asked[0] & asked[1]
    assert len({learned(each) for each in (finished / "sft", first, second)}) == 3
    assert (second / "start.safetensors").exists() and not (first / "start.safetensors").exists()
    assert steps_of(second)[0]["predicted_gap"] == pytest.approx(0, abs=1e-4)


MOMENTS = {
    "while_it_generates": lambda out: (out / "iteration-1/answers.jsonl.part").exists(),
    "while_it_learns": lambda out: rows_written(1)(out / "iteration-1"),
    "in_the_second_iteration": lambda out: (out / "iteration-2/answers.jsonl").exists(),
    "while_it_learns_again": lambda out: rows_written(2)(out / "iteration-2"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_iterations_end_bit_for_bit_where_they_would_have(tercet, command, undisturbed, tmp_path, moment):
    out = tmp_path / "run"
    tercet.start(*command, "--out", out).stop_when(lambda: MOMENTS[moment](out), signal.SIGKILL)
    assert not (out / "iteration-2/done.json").exists()
    tercet(*command, "--out", out)
    for name in ("iteration-1", "iteration-2"):
        assert_same(out / name, undisturbed / name)
        for file in ("answers.jsonl", "scored.jsonl", "pairs/train.jsonl"):
            assert (out / name / file).read_bytes() == (undisturbed / name / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--iterations", 0), "none may be below 1"),
        (("--iterations", 2, "--prepared", "somewhere"), "prepared pairs are of one policy"),
        (("--kl-coef", 0.1, "--prepared", "somewhere"), "leave kl_coef at 0, or let tercet rebel do all parts"),
        (("selection.select=best",), "which gives no pairs"),
        (("--eta", 0), "both must be above 0"),
        ((), "there is nothing to learn from"),
    ],
)
def test_what_makes_no_sense_is_refused(tercet, tmp_path, words, said):
    assert said in tercet("rebel", *MACHINE, *words, "--out", tmp_path / "run", code=2).err


ASKER = 'def asks(dialogues):\n    return [f"And {len(each)}?" for each in dialogues]\n'


def test_refuel_branches_dialogues_and_learns_the_branched_turn_alone(tercet, finished, rows, reward, tmp_path):
    (tmp_path / "asker.py").write_text(ASKER)
    user = f"{tmp_path / 'asker.py'}:asks"
    tercet(
        "rebel", *MACHINE, "--policy", finished / "sft", "--data", rows.comparisons, "--reward.function", reward,
        "--prompts", 12, "--max-steps", 1, "answers.n=2", "answers.max_tokens=6", "selection.drop_unfinished=false",
        "answers.turns=3", f"answers.user={user}", "--out", tmp_path / "run",
    )  # fmt: skip
    folder = tmp_path / "run/iteration-1"
    groups = rows_of(folder / "scored.jsonl")
    deep = [row for row in groups if len(row["prompt"]) > 1]
    assert deep and all(row["prompt"][-1]["content"] == f"And {len(row['prompt']) - 1}?" for row in deep)
    gone_on = [each for row in groups for each in row["completions"] if "after" in each]
    assert gone_on and all(each["reward"] == len(each["after"][-1]["content"]) / 10 for each in gone_on)
    pairs = rows_of(folder / "pairs/train.jsonl")
    ids = {tuple(each["tokens"]) for row in groups for each in row["completions"]}
    assert all(tuple(pair["chosen_tokens"]) in ids for pair in pairs)


def test_a_policy_can_speak_as_the_user(tercet, finished, rows, tmp_path):
    words = ("--policy", finished / "rl", "--data", rows.comparisons, "--rows", 8, "--n", 2, "--max-tokens", 5)
    out = ("--turns", 2, "--user", finished / "sft", "--threads", 1, "--out", tmp_path / "a.jsonl")
    tercet("generate", *words, *out)
    assert any(len(row["prompt"]) == 3 for row in rows_of(tmp_path / "a.jsonl"))
    assert "wants a user" in tercet("generate", *words, "--turns", 2, "--out", tmp_path / "b.jsonl", code=2).err


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if len(self.asked) == 1:  # busy at first
            self.send_error(503)
            return
        content = [{"message": {"content": f"{body['messages'][-1]['content'][:3]} {i}"}} for i in range(body["n"])]
        said = json.dumps({"choices": content}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *words):
        pass


def test_a_foreign_model_answers_over_http(tercet, rows, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        words = ("generate", "--endpoint", url, "--data", rows.comparisons, "--rows", 3, "--n", 2)
        assert "Give --endpoint-model" in tercet(*words, "--out", tmp_path / "a.jsonl", code=2).err
        for unknown in (("--top-k", 5), ("--min-p", 0.1)):
            assert "has neither" in tercet(*words, *unknown, "--out", tmp_path / "a.jsonl", code=2).err
        tercet(*words, "--endpoint-model", "theirs", "--columns", "published", "--out", tmp_path / "a.jsonl")
    finally:
        server.shutdown()
        server.server_close()
    found = rows_of(tmp_path / "a.jsonl")
    assert len(found) == 3 and all(row["response_1"] == f"{row['prompt'][:3]} 1" for row in found)
    asked = Server.asked[1:]
    settings = {(each["model"], each["temperature"], each["top_p"], each["max_tokens"]) for each in asked}
    assert settings == {("theirs", 0.8, 0.9, 2048)}
    assert len({each["seed"] for each in asked}) == 3


def test_every_metric_is_described(undisturbed):
    named = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/rebel.md").read_text().replace("```", "")))
    found = {key.removeprefix("test/") for row in measured(undisturbed / "iteration-2") for key in row} - {"step"}
    assert found <= named
