"""Reinforcement learning by itself: from a policy and a judge that were trained before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tercet.algorithms.policy_gradient import RLConfig
from tercet.recipes.evaluate import Arena, EvaluationConfig
from tercet.recipes.rows import held_out_questions, prompts_to_learn
from tercet.recipes.session import Say, Session, SetupConfig, open_session
from tercet.recipes.stages import run_rl
from tercet.recipes.trained import check_same_base, judge_at, judge_place, weights_at
from tercet.runs.durable import write_atomically
from tercet.runs.rows import encode_row
from tercet.types import Weights


@dataclass(frozen=True, kw_only=True)
class RLRunConfig(RLConfig, SetupConfig):
    """Learn from a judge's verdicts on the policy's own answers."""

    judge_model: str
    """The preference model: the folder of a run of tercet preference, or of tercet rlhf."""
    policy: str = "base"
    """The policy to start from: the folder of a run of tercet sft, an adapter's directory, or base."""
    test_data: str | None = None
    """Held-out prompts; null takes the test split of `data`, or holds some of its prompts out."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How policies are compared."""
    out: str = "runs/rl"
    """Folder of the run; the same command goes on where it stood."""


def train_rl(config: RLRunConfig, *, say: Say = print) -> Path:
    """Train, then compare the policy with the one it started from in `evaluation.json`.

    Returns:
        The run's folder.
    """
    judge_model = judge_place(config.judge_model)
    check_same_base(config, config.policy, judge_model)
    start, judge_weights = weights_at(config.policy, "policy"), weights_at(judge_model, "judge_model")
    session = open_session(config, say)
    directory = Path(config.out)
    judge = judge_at(session, judge_model, verdict=config.judge)
    session.check_room(limit=judge.renderer.limit, answer_tokens=max(config.max_tokens, config.evaluation.max_tokens))
    held_out = held_out_questions(session, config.data, config.test_data, config.evaluation.prompts)
    arena = Arena(session, config.evaluation, held_out, {"preference": judge_at(session, judge_model)})
    first = session.engine.sampler(start)
    policy = run_rl(
        session,
        config,
        directory,
        prompts_to_learn(session, config, held_out),
        init=start,
        judge=judge,
        evaluate=lambda sampler, step: arena.measure(sampler, first, last=step == config.steps),
        kept=session.config_of(RLRunConfig, config),
        origin=origin(session, start, judge_weights),
    )
    if not (directory / "evaluation.json").exists():
        say("evaluation: the policy and the one it started from, on held-out prompts")
        policies = {"start": first, "rl": session.engine.sampler(policy)}
        write_evaluation(directory, arena.report(policies, start="start"))
    return directory


def origin(session: Session, policy: Weights | None, judge: Weights | None) -> dict[str, str]:
    """Which weights an RL run begins with and is judged by."""
    return {"policy_sha256": session.fingerprint(policy), "judge_sha256": session.fingerprint(judge)}


def write_evaluation(directory: Path, found: Mapping[str, Any]) -> None:
    """Keep what an evaluation found, beside the run."""
    write_atomically(directory / "evaluation.json", as_json(found))


def as_json(found: Mapping[str, Any]) -> str:
    """What an evaluation found, as JSON; a number that is not finite becomes null."""
    return json.dumps(json.loads(encode_row(found)), indent=1) + "\n"
