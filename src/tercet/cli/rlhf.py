"""`tercet rlhf`: all three stages."""

from __future__ import annotations

from tercet.config import parse
from tercet.recipes.rlhf import RLHFConfig, rlhf


def main(argv: list[str]) -> int:
    """Run the verb."""
    rlhf(parse(RLHFConfig, argv, prog="tercet rlhf"))
    return 0
