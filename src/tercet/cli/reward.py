"""`tercet reward`: a scalar reward model."""

from __future__ import annotations

from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.reward import RewardRunConfig, train_reward


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(RewardRunConfig, argv, prog="tercet reward")
    root = train_reward(config, say=say)
    finish(root, [("learn from it", f"tercet ppo --reward.model {root} --policy RUN --model {config.model}")])
    return 0
