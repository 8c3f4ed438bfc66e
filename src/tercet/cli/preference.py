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


@dataclass(frozen=True, kw_only=True)
class PreferenceRunConfig(PreferenceConfig, SetupConfig):
    """Learn from comparisons to tell the better of two answers."""

    out: str = "runs/preference"
    """Folder of the run; the same command goes on where it stood."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(PreferenceRunConfig, argv, prog="tercet preference")
    session = open_session(config, say)
    run_preference(session, config, Path(config.out), *load_pairs(session, config))
    next_ = f"tercet rl --judge-model {config.out} --policy RUN --model {config.model}"
    finish(Path(config.out), [("judge with it", next_)])
    return 0
