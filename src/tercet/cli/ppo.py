"""`tercet ppo`: reinforcement learning from scores, with a critic."""

from __future__ import annotations

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.ppo import PPORunConfig, train_ppo


def main(argv: list[str]) -> int:
    """Run the verb."""
    root = train_ppo(parse(PPORunConfig, argv, prog="tercet ppo"), say=say)
    finish(
        root, [("talk to it", f"tercet chat {root}"), ("take it elsewhere", f"tercet export {root} --out DIRECTORY")]
    )
    return 0
