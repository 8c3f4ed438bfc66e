"""One page that opens without a network and tells what happened."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_trainer import open_run, train
from synthetic import TRICKY, rl_metrics, write_pipeline, write_stage

from tercet.errors import DataError, UsageError
from tercet.runs.folder import read_folder
from tercet.runs.report import headline, verdict, write_report


class Page(HTMLParser):
    """The words, the tags and the attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "first-run"
    write_pipeline(root, sft_steps=12, judge_steps=12, rl_steps=12)
    return root


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return write_report(root).read_text()


def test_the_headline_has_the_numbers_of_the_evaluation(html: str) -> None:
    text = Page(html).text
    for words in (
        "RL made it better: 76% of answers win against the SFT policy; the held-out judge agrees (71%)",
        "95% interval 70% to 82%, 120 prompts",
        "95% interval 64% to 77%, 120 prompts",
        "89% both orders averaged; 88% of single verdicts, 6% of pairs flip with the order",
        "2.370 → 1.", # the NLL before training is 1.62 + 0.7 + 0.05
    ):  # fmt: skip
        assert words in text


def test_every_stage_and_every_check_is_there_with_labelled_axes(html: str) -> None:
    text = Page(html).text
    for words in (
        "Supervised fine-tuning", "Preference model", "Held-out judge", "Reinforcement learning",
        "nats per token", "bits per byte", "win rate (share of prompts)", "KL to the starting policy (nats per answer)",
        "length of the answer (tokens)", "confidence (probability of the verdict)", "verdict flips with the order",
        "12 steps", "RL against chosen answers", "0.034", "learning_rate: 0.0002", "torch",
    ):  # fmt: skip
        assert words in text, words


def test_the_page_refers_to_nothing_outside_of_itself(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "data"}:
            assert value.startswith("#"), (name, value)
        assert "://" not in value, (name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", html))
    assert "@import" not in html


def test_what_comes_from_data_is_escaped_and_shown_as_it_is(html: str) -> None:
    assert "<script>alert" not in html
    # Once in each of six samples, and in each stage's config.
    assert Page(html).text.count(TRICKY) == 6 + 4


def test_figures_take_their_colours_from_the_page(html: str) -> None:
    assert "var(--blue)" in html and "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"(fill|stroke): #", drawings)


def test_identifiers_that_a_drawing_refers_to_are_on_the_page(html: str) -> None:
    attributes = Page(html).attributes
    ids = {value for name, value in attributes if name == "id"}
    used = {value[1:] for name, value in attributes if name in {"href", "xlink:href"}}
    used |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert used and used <= ids


@pytest.mark.parametrize("missing", [("sft", "config.yaml"), ("preference", "judge"), ("rl", "evaluation.json")])
def test_any_part_may_be_missing(tmp_path: Path, root: Path, missing: tuple[str, ...]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*missing))
    assert "<h1>" in write_report(copy).read_text()


@pytest.mark.parametrize(
    ("stage", "words"),
    [("sft", "Held-out NLL"), ("preference", "Preference accuracy"), ("rl", "RL wins against its start")],
)
def test_a_single_stage_has_a_report_too(root: Path, stage: str, words: str) -> None:
    text = Page(write_report(root / stage).read_text()).text
    assert words in text
    (root / stage / "report.html").unlink()


def test_a_stage_of_another_name_shows_each_of_its_metrics(tmp_path: Path) -> None:
    write_stage(tmp_path, "dpo", 4, [{"margin": 0.1 * step, "loss": 0.7} for step in range(4)])
    text = Page(write_report(tmp_path).read_text()).text
    assert "dpo" in text and "margin" in text


def test_a_run_under_way_is_reported_as_not_finished(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        train(run, until=5)
    assert "5 steps" in (text := Page(write_report(tmp_path).read_text()).text)
    assert "not finished" in text


def test_a_number_that_was_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", 3, [{"train_mean_nll": value} for value in (2.0, float("nan"), 1.5)])
    assert "Negative log-likelihood" in write_report(tmp_path).read_text()


def test_a_row_measured_after_the_last_step_counts_as_no_step(tmp_path: Path) -> None:
    write_stage(tmp_path, "sft", 3, [{"train_mean_nll": 2.0}] * 3 + [{"test/nll": 1.0}])
    assert read_folder(tmp_path).stages["sft"].steps == 3


@pytest.mark.parametrize(
    ("training", "held_out", "words"),
    [
        ((0.6, 0.7, 0.8), (0.55, 0.6, 0.65), "better: 70% of answers win against the SFT policy; the held-out judge"),
        ((0.6, 0.7, 0.8), (0.45, 0.52, 0.6), "the held-out judge is not so sure (52%)"),
        ((0.6, 0.7, 0.8), (0.2, 0.3, 0.4), "the held-out judge disagrees (30%)"),
        ((0.4, 0.5, 0.6), (0.4, 0.5, 0.6), "No clear difference"),
        ((0.2, 0.3, 0.4), (0.2, 0.3, 0.4), "RL made it worse: 30%"),
    ],
)  # fmt: skip
def test_the_verdict_says_no_more_than_the_intervals_carry(
    tmp_path: Path, training: tuple[float, ...], held_out: tuple[float, ...], words: str
) -> None:
    for name in ("sft", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    rates = [
        {"policy": "rl", "against": "sft", "judge": judge, "low": low, "win_rate": rate, "high": high, "n": 40}
        for judge, (low, rate, high) in (("preference", training), ("held_out", held_out))
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"win_rates": rates}))
    assert words in verdict(read_folder(tmp_path))


def test_without_an_evaluation_the_last_win_rate_in_training_makes_the_headline(tmp_path: Path) -> None:
    write_stage(tmp_path / "rl", "rl", 8, rl_metrics(8))
    last = rl_metrics(8)[-1]
    card = next(headline(read_folder(tmp_path)))
    assert card.interval == (last["test/win_rate_low"], last["test/win_rate"], last["test/win_rate_high"])


def test_the_model_is_found_in_the_setup_of_a_pipeline(tmp_path: Path, root: Path) -> None:
    shutil.copytree(root / "sft", tmp_path / "sft")
    (tmp_path / "config.yaml").write_text("setup:\n  model: tiny\n")
    assert read_folder(tmp_path).model == "tiny"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        write_report(tmp_path)


def test_an_evaluation_that_is_no_json_is_named(tmp_path: Path, root: Path) -> None:
    shutil.copytree(root / "sft", tmp_path / "sft")
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json is not JSON"):
        write_report(tmp_path)
