"""The data card of the built-in corpus says what the corpus is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tercet.data.sources import CORPUS

CARD = (CORPUS / "README.md").read_text(encoding="utf-8")
ROWS: dict[str, list[dict[str, Any]]] = {
    name: [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("conversations", "comparisons")
}


def of_split(name: str, split: str) -> list[dict[str, Any]]:
    return [row for row in ROWS[name] if row["split"] == split]


def share_right(split: str, worth: Callable[[int], float]) -> float:
    """How often the better answer's length is worth more; equal ones count half."""
    pairs = [(worth(len(row["chosen"])), worth(len(row["rejected"]))) for row in of_split("comparisons", split)]
    return sum(0.5 if a == b else float(a > b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("name", ROWS)
def test_the_card_counts_the_rows_of_each_split(name: str):
    counts = [len(ROWS[name]), len(of_split(name, "train")), len(of_split(name, "test"))]
    assert f"| `{name}.jsonl` | {' | '.join(map(str, counts))} |" in CARD


def test_the_card_counts_the_faults():
    named = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) \|$", CARD, re.MULTILINE)
    train, test = (Counter(row["fault"] for row in of_split("comparisons", split)) for split in ("train", "test"))
    assert {fault: (int(a), int(b)) for fault, a, b in named} == {fault: (train[fault], test[fault]) for fault in train}


def test_the_card_names_the_kinds():
    kinds = {row["kind"] for rows in ROWS.values() for row in rows}
    assert len(kinds) == 20
    assert all(kind in CARD for kind in kinds)


def test_the_card_says_how_far_rules_of_length_get():
    rules: dict[str, Callable[[int], float]] = {
        "always the shorter answer": lambda n: -n,
        "always the longer answer": lambda n: n,
        "the answer nearer to 100 characters (the best length on train)": lambda n: -abs(n - 100),
    }
    for rule, worth in rules.items():
        assert f"| {rule} | {share_right('train', worth):.0%} | {share_right('test', worth):.0%} |" in CARD
