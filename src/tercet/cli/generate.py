"""`tercet generate`: answers to a file of prompts."""

from __future__ import annotations

from tercet.cli.closing import say
from tercet.config import parse
from tercet.recipes.generating import GenerateConfig, generate


def main(argv: list[str]) -> int:
    """Run the verb."""
    print(generate(parse(GenerateConfig, argv, prog="tercet generate"), say=say))
    return 0
