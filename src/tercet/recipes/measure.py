"""Policies against each other, and judges against people's verdicts, from weights that lie on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tercet import data
from tercet.errors import UsageError
from tercet.evaluation.judges import agreement
from tercet.recipes.evaluate import Arena, EvaluationConfig
from tercet.recipes.rows import Question, gives_comparisons, questions, some, usable_comparisons
from tercet.recipes.session import Say, Session, open_session
from tercet.recipes.trained import BASE, TrainedConfig, either_judge_at, judge_place, policy_at
from tercet.rewards.judge import Judge
from tercet.rewards.scalar import ScalarJudge


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(TrainedConfig):
    """Win rate of a policy against another; without a policy, accuracy and calibration of a judge."""

    run: str | None = field(default=None, metadata={"positional": True})
    """The folder of a whole tercet rlhf: its RL policy against its SFT policy, under both of its judges."""
    judge_model: str | None = None
    """The preference model: the folder of a run of tercet preference."""
    held_out_judge: str | None = None
    """A second judge, which the policy was not trained against."""
    policy: str | None = None
    """The policy: the folder of a run, an adapter's directory, or base."""
    baseline: str = BASE
    """The policy it is compared with."""
    data: str = "builtin"
    """Prompts, or comparisons; the test split is taken where there is one."""
    rows: int = 100
    """Prompts or comparisons, at most."""
    max_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used and count them, instead of stopping at the first."""
    out: Path | None = None
    """A json file for everything that was found, in the form of evaluation.json; it must not exist."""

    def whole(self) -> MeasureConfig:
        """With the folder of a whole run opened into policies and judges.

        Raises:
            UsageError: There is no judge, or the folder lacks a stage.
        """
        if self.run is None:
            if self.judge_model is None:
                raise UsageError("which judge? Give --judge-model RUN, or the folder of a tercet rlhf")
            return replace(self, judge_model=judge_place(self.judge_model))
        root = Path(self.run)
        absent = [name for name in ("sft", "preference", "rl") if not (root / name).is_dir()]
        if absent:
            raise UsageError(
                f"{root} lacks {', '.join(absent)}, so it is not the folder of a tercet rlhf; name what is to be "
                "compared with --policy, --baseline and --judge-model"
            )
        second = str(root / "judge") if (root / "judge").is_dir() else None
        return replace(
            self,
            run=None,
            policy=self.policy or str(root / "rl"),
            baseline=str(root / "sft") if self.baseline == BASE else self.baseline,
            judge_model=self.judge_model or str(root / "preference"),
            held_out_judge=self.held_out_judge or second,
        )


def measure(config: MeasureConfig, *, say: Say = print) -> dict[str, Any]:
    """What `evaluation.json` says: win rates and policies where there is a policy, else judges."""
    config = config.whole()
    assert config.judge_model is not None
    setup = config.setup(config.policy, config.baseline, config.judge_model, config.held_out_judge)
    session = open_session(replace(setup, skip_bad_rows=config.skip_bad_rows), say)
    judges = {"preference": either_judge_at(session, config.judge_model, what="judge_model")}
    if config.held_out_judge is not None:
        judges["held_out"] = either_judge_at(session, config.held_out_judge, what="held_out_judge")
    if config.policy is None:
        return {"judges": _judged(session, config, judges)}
    for judge in judges.values():
        session.check_room(limit=judge.renderer.limit, answer_tokens=config.max_tokens)
    settings = EvaluationConfig(
        prompts=config.rows, against_chosen=config.rows, max_tokens=config.max_tokens, temperature=config.temperature
    )
    arena = Arena(session, settings, _questions(session, config), judges)
    policies = {
        "baseline": policy_at(session, config.baseline, "baseline"),
        "policy": policy_at(session, config.policy),
    }
    say(f"{config.policy} against {config.baseline} on {len(arena.questions)} prompts")
    return arena.report(policies, start="baseline")


def _judged(session: Session, config: MeasureConfig, judges: Mapping[str, Judge | ScalarJudge]) -> dict[str, Any]:
    loaded = data.load_comparisons(config.data, split=_split(config, "comparisons"), skip_bad_rows=config.skip_bad_rows)
    session.say(loaded.describe())
    rows = some(loaded.rows, config.rows, seed=config.seed)
    limit = min(judge.renderer.limit for judge in judges.values())
    rows = usable_comparisons(session, rows, limit, "held out")
    return {name: agreement(judge, rows).report() for name, judge in judges.items()}


def _questions(session: Session, config: MeasureConfig) -> list[Question]:
    skip = config.skip_bad_rows
    if gives_comparisons(config.data):
        pairs = data.load_comparisons(config.data, split=_split(config, "comparisons"), skip_bad_rows=skip)
        session.say(pairs.describe())
        return some(questions(pairs.rows), config.rows, seed=config.seed)
    prompts = data.load_prompts(config.data, split=_split(config, "prompts"), skip_bad_rows=skip)
    session.say(prompts.describe())
    return some([Question(prompt) for prompt in prompts.rows], config.rows, seed=config.seed)


def _split(config: MeasureConfig, purpose: Any) -> str:
    return "test" if "test" in data.splits(config.data, purpose=purpose) else "train"
