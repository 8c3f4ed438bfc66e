"""`tercet rl`: reinforcement learning from a policy and a judge that were trained before."""

from __future__ import annotations

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.rl import RLRunConfig, train_rl


def main(argv: list[str]) -> int:
    """Run the verb."""
    root = train_rl(parse(RLRunConfig, argv, prog="tercet rl"), say=say)
    finish(
        root, [("talk to it", f"tercet chat {root}"), ("take it elsewhere", f"tercet export {root} --out DIRECTORY")]
    )
    return 0
