"""`tercet score` by each of its sources: the numbers are those of the source itself, in the order of the answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, pipeline

from tercet.chat.answers import AnswerRenderer
from tercet.chat.renderers import renderer
from tercet.data.files import read_file
from tercet.engine.local import LocalEngine
from tercet.models.load import load_model, load_tokenizer
from tercet.runs.checkpoints import final_weights
from tercet.types import Message
from tests.e2e.commands import MACHINE

GROUPS = 18  # 16 are a part
NORMALISED = {"mean": 0.25, "std": 0.5}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """One, two or three answers to a prompt, of several lengths."""
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        {"prompt": f"What is {i} and {i}?", **{f"response_{j}": "So: " + "yes. " * ((i + 2 * j) % 5) for j in range(n)}}
        for i in range(GROUPS)
        for n in [1 + i % 3]
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture(scope="module")
def models(tercet, rows, tmp_path_factory) -> list[Path]:
    """Two scalar reward models; the first one's scores are shifted and scaled."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tercet(
            "reward", *MACHINE, "--data", rows.comparisons, "--pairs-per-step", 2, "--max-steps", 2, "--seed", seed,
            "--learning-rate", 3e-3, "--warmup-steps", 0, "--eval-every-steps", 0, "--out", root / str(seed),
        )  # fmt: skip
    (root / "0/normalisation.json").write_text(json.dumps(NORMALISED))
    return [root / "0", root / "1"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A text classifier of two labels with random weights."""
    directory = tmp_path_factory.mktemp("classifier")
    tokenizer = load_tokenizer("tiny")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1}, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        model.classifier.weight.data.normal_(std=1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Server:
    """Gives every answer its length, and refuses every request after the first `patience`."""

    def __init__(self) -> None:
        self.patience, self.asked = 1000, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if len(outer.asked) >= outer.patience:
                    self.send_error(404)
                    return
                outer.asked.append([each[0]["content"] for each in body["completions"]])
                said = json.dumps({"rewards": [len(words) for words in outer.asked[-1]]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *words):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    started = Server()
    yield started
    started.http.shutdown()
    started.http.server_close()


def texts(answers: Path) -> list[list[str]]:
    return [[value for name, value in row.items() if name != "prompt"] for _, row in read_file(answers)]


def scores(path: Path) -> list[list[float]]:
    return [[each["reward"] for each in row["completions"]] for _, row in read_file(path)]


def numbers(nested: list[list[float]]) -> list[float]:
    return [number for row in nested for number in row]


def heads(answers: Path, model: Path) -> list[float]:
    """What the head of a reward model says at the end of each conversation."""
    loaded = load_model("tiny")
    shown = AnswerRenderer(renderer("auto", loaded.tokenizer), 1024)
    sequences = [
        shown.tokens((Message("user", row["prompt"]),), (Message("assistant", words),))
        for (_, row), group in zip(read_file(answers), texts(answers), strict=True)
        for words in group
    ]
    return LocalEngine(loaded).scorer(final_weights(model)).scores(sequences).result()


def score(tercet, answers: Path, out: Path, *words: object, code: int = 0):
    """Run the verb; every prompt and every answer must be where it was."""
    ended = tercet("score", "--data", answers, *words, "--threads", 1, "--out", out, code=code)
    if code == 0:
        assert [row["prompt"][0]["content"] for _, row in read_file(out)] == [
            r["prompt"] for _, r in read_file(answers)
        ]
        assert [[each["text"] for each in row["completions"]] for _, row in read_file(out)] == texts(answers)
    return ended


def test_a_reward_model_gives_its_heads_numbers_shifted_and_scaled(tercet, answers, models, tmp_path):
    score(tercet, answers, tmp_path / "scored.jsonl", "--reward.model", models[0])
    found = numbers(scores(tmp_path / "scored.jsonl"))
    assert len(set(found)) > GROUPS
    assert found == pytest.approx([(head - 0.25) / 0.5 for head in heads(answers, models[0])], abs=1e-5)


def test_an_ensemble_gives_the_mean_of_its_models(tercet, answers, models, tmp_path):
    score(tercet, answers, tmp_path / "scored.jsonl", "--ensemble", f"[{models[0]},{models[1]}]")
    both = [((a - 0.25) / 0.5 + b) / 2 for a, b in zip(*(heads(answers, model) for model in models), strict=True)]
    assert numbers(scores(tmp_path / "scored.jsonl")) == pytest.approx(both, abs=1e-5)


@pytest.mark.parametrize(("gives", "function"), [("probability", "softmax"), ("logit", "none")])
def test_a_classifier_gives_what_transformers_pipeline_gives(tercet, answers, classifier, tmp_path, gives, function):
    words = ("--reward.classifier", classifier, "--reward.label", "GOOD", "--reward.gives", gives)
    score(tercet, answers, tmp_path / "scored.jsonl", *words)
    classify = pipeline("text-classification", model=str(classifier), device="cpu")
    said = classify(list(chain(*texts(answers))), function_to_apply=function, top_k=None, batch_size=1)
    wanted = [next(each["score"] for each in row if each["label"] == "GOOD") for row in said]
    assert numbers(scores(tmp_path / "scored.jsonl")) == pytest.approx(wanted, abs=1e-5)


def test_a_server_gives_every_answer_its_number(tercet, answers, server, tmp_path):
    score(tercet, answers, tmp_path / "scored.jsonl", "--reward.url", server.url)
    assert scores(tmp_path / "scored.jsonl") == [[float(len(words)) for words in group] for group in texts(answers)]


def test_a_scoring_that_broke_off_goes_on_with_the_same_model_where_it_stood(tercet, answers, models, server, tmp_path):
    out, part = tmp_path / "scored.jsonl", tmp_path / "scored.jsonl.part"
    words = ("--reward.url", server.url, "reward.weights={url: 2}")
    server.patience = 1  # one request is the first part: 16 prompts, 31 answers
    said = score(tercet, answers, out, *words, "--reward.model", models[0], code=1).err
    assert "refused the request: 404" in said
    assert len(part.read_text().splitlines()) == 16 and not out.exists()
    server.patience = 1000
    said = score(tercet, answers, out, *words, "--reward.model", models[1], code=2).err
    assert "reward_sha256.model" in said and len(server.asked) == 1
    score(tercet, answers, out, *words, "--reward.model", models[0])
    assert [len(request) for request in server.asked] == [31, 5] and not part.exists()
    lengths = [len(words) for group in texts(answers) for words in group]
    wanted = [2 * n + (head - 0.25) / 0.5 for n, head in zip(lengths, heads(answers, models[0]), strict=True)]
    assert numbers(scores(out)) == pytest.approx(wanted, abs=1e-5)
