"""`tercet dpo`: learning from pairs of answers."""

from __future__ import annotations

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.direct import DPORunConfig, train_dpo


def main(argv: list[str]) -> int:
    """Run the verb."""
    root = train_dpo(parse(DPORunConfig, argv, prog="tercet dpo"), say=say)
    hints = [("talk to it", f"tercet chat {root}"), ("compare it", f"tercet eval --policy {root} --judge-model RUN")]
    finish(root, hints)
    return 0
