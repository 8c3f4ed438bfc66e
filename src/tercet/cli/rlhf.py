"""`tercet rlhf`: all three stages."""

from __future__ import annotations

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.rlhf import RLHFConfig, rlhf


def main(argv: list[str]) -> int:
    """Run the verb."""
    root = rlhf(parse(RLHFConfig, argv, prog="tercet rlhf"), say=say)
    finish(
        root, [("talk to it", f"tercet chat {root}"), ("take it elsewhere", f"tercet export {root} --out DIRECTORY")]
    )
    return 0
