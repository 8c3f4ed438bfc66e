"""The command line, small data, and one finished `tercet rlhf` that many tests look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tercet.data.sources import CORPUS
from tests.e2e.commands import MACHINE, CommandLine


@pytest.fixture(scope="session")
def tercet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path_factory.mktemp("commands"))
    yield line
    line.close()


@dataclass(frozen=True)
class Rows:
    """Files of a few short rows of the built-in corpus."""

    conversations: Path
    comparisons: Path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    for name in ("conversations", "comparisons"):
        lines = (CORPUS / f"{name}.jsonl").read_text().splitlines()
        few = [{k: v for k, v in json.loads(line).items() if k != "split"} for line in sorted(lines, key=len)[:30]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    return Rows(folder / "conversations.jsonl", folder / "comparisons.jsonl")


@pytest.fixture(scope="session")
def small(rows: Rows) -> tuple[object, ...]:
    """Settings with which `tercet rlhf` takes two seconds."""
    return (
        *MACHINE,
        f"sft.data={rows.conversations}", "sft.batch_size=8", "sft.max_steps=4", "sft.save_every_steps=2",
        f"preference.data={rows.comparisons}", "preference.pairs_per_step=2", "preference.max_steps=4",
        "preference.eval_every_steps=2", "preference.save_every_steps=2",
        "judge.pairs_per_step=2", "judge.max_steps=4", "judge.eval_every_steps=2", "judge.save_every_steps=2",
        f"rl.data={rows.comparisons}", "rl.steps=3", "rl.prompts_per_step=2", "rl.max_tokens=8",
        "rl.eval_every_steps=2", "rl.save_every_steps=1",
        "evaluation.prompts=3", "evaluation.prompts_while_training=2", "evaluation.max_tokens=8",
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(tercet: CommandLine, small: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `tercet rlhf` that ran to its end; look, but change nothing."""
    root = tmp_path_factory.mktemp("finished") / "run"
    (root.parent / "said.txt").write_text(tercet("rlhf", "--out", root, *small).out)
    return root
