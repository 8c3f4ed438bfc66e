"""`tercet rebel`: learning from the policy's own answers, ranked."""

from __future__ import annotations

from pathlib import Path

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.rebel_iteration import RebelRunConfig, train_rebel


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(RebelRunConfig, argv, prog="tercet rebel")
    policy = train_rebel(config, say=say)
    hints = [
        ("talk to it", f"tercet chat {policy}"),
        ("compare it", f"tercet eval --policy {policy} --judge-model RUN"),
    ]
    finish(Path(config.out), hints)
    return 0
