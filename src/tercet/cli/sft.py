"""`tercet sft`: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.algorithms.sft import SFTConfig
from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.session import SetupConfig, open_session
from tercet.recipes.stages import run_sft


@dataclass(frozen=True, kw_only=True)
class SFTRunConfig(SFTConfig, SetupConfig):
    """Learn from conversations: make the answers of a data set likely."""

    out: str = "runs/sft"
    """Folder of the run; the same command goes on where it stood."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(SFTRunConfig, argv, prog="tercet sft")
    run_sft(open_session(config, say), config, Path(config.out))
    next_ = f"tercet rl --policy {config.out} --judge-model RUN --model {config.model}"
    finish(Path(config.out), [("talk to it", f"tercet chat {config.out}"), ("learn from a judge", next_)])
    return 0
