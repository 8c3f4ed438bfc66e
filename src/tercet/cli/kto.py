"""`tercet kto`: learning from answers labelled good or bad."""

from __future__ import annotations

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.direct import KTORunConfig, train_kto


def main(argv: list[str]) -> int:
    """Run the verb."""
    root = train_kto(parse(KTORunConfig, argv, prog="tercet kto"), say=say)
    hints = [("talk to it", f"tercet chat {root}"), ("compare it", f"tercet eval --policy {root} --judge-model RUN")]
    finish(root, hints)
    return 0
