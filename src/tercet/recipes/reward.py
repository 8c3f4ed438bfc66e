"""A scalar reward model, with its rows and its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.algorithms.reward_model import RewardModelConfig, grouped, reward_model
from tercet.algorithms.rollouts import answer
from tercet.errors import TrainingError
from tercet.recipes.reward_source import NORMALISATION_FILE, scalar_judge_at
from tercet.recipes.rows import load_answers, rows_sha256
from tercet.recipes.session import Say, Session, SetupConfig, open_session
from tercet.recipes.stages import open_run, place_of
from tercet.recipes.trained import check_same_base, policy_at, weights_at
from tercet.runs.durable import write_atomically
from tercet.types import Comparison, Head, SamplingParams, Weights


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig(RewardModelConfig, SetupConfig):
    """Learn from comparisons to give an answer one number."""

    policy: str = "base"
    """The weights to start from: the folder of a run of tercet sft, an adapter's directory, or base."""
    normalise_on: str | None = None
    """A policy whose answers shall score 0 on average with standard deviation 1, as rewards: the folder of a run, an
    adapter's directory, or base. Recorded in normalisation.json, and read by whoever takes rewards from the run."""
    normalise_answers: int = 64
    """Answers of that policy that are scored, one to a prompt."""
    normalise_max_tokens: int = 48
    """Longest of these answers in tokens."""
    out: str = "runs/reward"
    """Folder of the run; the same command goes on where it stood."""


def train_reward(config: RewardRunConfig, *, say: Say = print) -> Path:
    """Train a reward model.

    Returns:
        The run's folder.
    """
    check_same_base(config, config.policy)
    start = weights_at(config.policy, "policy")
    session = open_session(config, say)
    rows, test = load_answers(session, config)
    directory = Path(config.out)
    run_reward(session, config, directory, rows, test, init=start)
    if config.normalise_on is not None and not (directory / NORMALISATION_FILE).exists():
        normalise(session, config, rows)
    return directory


def normalise(session: Session, config: RewardRunConfig, rows: Sequence[Comparison]) -> None:
    """Score a policy's answers to the learned prompts, and record mean and standard deviation (n) of the scores."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))[: config.normalise_answers]
    params = SamplingParams(max_tokens=config.normalise_max_tokens, stop=session.renderer.stop, seed=session.setup.seed)
    groups = answer(prompts, policy_at(session, config.normalise_on, "normalise_on"), session.renderer, params, 1)
    judge = scalar_judge_at(session, config.out, "out")
    scores = judge.scores([(each.prompt, each.conversation) for [each] in groups])
    found = {"mean": statistics.fmean(scores), "std": statistics.pstdev(scores)}
    if not found["std"] > 0:
        raise TrainingError(f"{config.normalise_on} gives answers that all score {found['mean']}: nothing to scale by")
    record = {**found, "policy": config.normalise_on, "answers": len(scores)}
    write_atomically(Path(config.out) / NORMALISATION_FILE, json.dumps(record, indent=1) + "\n")
    session.say(f"rewards: scores less {found['mean']:.3f}, over {found['std']:.3f}; {config.normalise_on} has mean 0")


def run_reward(
    session: Session,
    config: RewardModelConfig,
    directory: Path,
    rows: Sequence[Comparison],
    test: Sequence[Comparison],
    *,
    init: Weights | None = None,
    stage: str = "reward",
) -> Weights:
    """Stage 2 with a scalar model, trained from the base or from `init`, with a new head."""
    setup = session.setup
    groups = grouped(rows, k_wise=config.k_wise)
    longest = session.longest(((*r.prompt, *answer) for r in rows for answer in (r.a, r.b)), config.max_length)
    tied = max((len({answer for row in group for answer in (row.a, row.b)}) for group in groups), default=2)
    with open_run(
        session,
        directory,
        stage,
        session.config_of(RewardModelConfig, config, policy=place_of(init), out=directory),
        {"rows_sha256": rows_sha256(rows), "policy_sha256": session.fingerprint(init)},
        steps=config.steps(len(groups)),
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.pairs_per_step} {'prompts' if config.k_wise else 'comparisons'}, of which there are "
        f"{len(groups):,}; {session.memory(longest_tokens=longest, tied=tied)}",
    ) as run:
        if not run.is_done:
            head = Head(init_std=config.head_init_std)
            trainer = session.engine.trainer(init=init, lora=setup.adapter, seed=setup.seed, head=head)
            shown = session.answers(config.max_length)
            reward_model(config, groups, test, shown, trainer=trainer, run=run, seed=setup.seed)
        return run.final_weights
