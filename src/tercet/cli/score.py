"""`tercet score`: rewards for a file of answers."""

from __future__ import annotations

from tercet.cli.closing import say
from tercet.config import parse
from tercet.recipes.scoring import ScoreConfig, score


def main(argv: list[str]) -> int:
    """Run the verb."""
    print(score(parse(ScoreConfig, argv, prog="tercet score"), say=say))
    return 0
