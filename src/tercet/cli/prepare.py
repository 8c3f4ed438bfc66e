"""`tercet prepare`: pairs of a file of scored answers."""

from __future__ import annotations

from tercet.cli.closing import say
from tercet.config import parse
from tercet.recipes.preparing import PrepareConfig, prepare_file


def main(argv: list[str]) -> int:
    """Run the verb."""
    print(prepare_file(parse(PrepareConfig, argv, prog="tercet prepare"), say=say))
    return 0
