"""The docs name what a run writes, and link to what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("src/tercet/**/*.md")])
RECIPES = (ROOT / "docs/recipes.md").read_text()


def described(begin: str, end: str) -> set[str]:
    """The keys in the first column of the tables between two headings."""
    section = RECIPES[RECIPES.index(begin) : RECIPES.index(end)]
    return set(re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE))))


def keys(finished: Path, *stages: str) -> set[str]:
    rows = [
        json.loads(line) for stage in stages for line in (finished / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return {key for row in rows for key in row} - {"step"}


def test_every_metric_of_the_supervised_stages_is_described_and_no_other(finished: Path):
    stages = ("sft", "preference", "judge")
    assert described("### sft, preference, judge", "### rl") == keys(finished, *stages)


def test_every_metric_of_reinforcement_learning_is_described_and_no_other(finished: Path):
    only_of_other_losses = {"clip_ratio"}
    assert described("### rl", "## evaluation.json") - only_of_other_losses == keys(finished, "rl")


def test_every_field_of_the_evaluation_is_described(finished: Path):
    section = RECIPES[RECIPES.index("## evaluation.json") :]
    named = set(re.findall(r'"(\w+)"', section[: section.rindex("```")]))
    found = json.loads((finished / "evaluation.json").read_text())
    written = {
        *found,
        *found["win_rates"][0],
        *found["policies"]["rl"],
        *found["judges"]["preference"],
        *found["samples"][0],
    }
    assert written <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
