"""`tercet preference`: a preference model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.algorithms.preference_model import PreferenceConfig
from tercet.cli.closing import finish, say
from tercet.config import parse
from tercet.recipes.rows import load_pairs
from tercet.recipes.session import SetupConfig, open_session
from tercet.recipes.stages import run_preference
from tercet.recipes.trained import check_same_base, weights_at


@dataclass(frozen=True, kw_only=True)
class PreferenceRunConfig(PreferenceConfig, SetupConfig):
    """Learn from comparisons to tell the better of two answers."""

    policy: str = "base"
    """The weights to start from: the folder of a run of tercet sft, an adapter's directory, or base."""
    out: str = "runs/preference"
    """Folder of the run; the same command goes on where it stood."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(PreferenceRunConfig, argv, prog="tercet preference")
    check_same_base(config, config.policy)
    start = weights_at(config.policy, "policy")
    session = open_session(config, say)
    run_preference(session, config, Path(config.out), *load_pairs(session, config), init=start)
    next_ = f"tercet rl --judge-model {config.out} --policy RUN --model {config.model}"
    finish(Path(config.out), [("judge with it", next_)])
    return 0
