"""Policies against each other, and judges against people's verdicts, from weights that lie on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tercet import data
from tercet.algorithms.rollouts import Answer
from tercet.errors import ConfigError, UsageError
from tercet.evaluation.judges import agreement
from tercet.evaluation.length_controlled import length_controlled
from tercet.recipes.evaluate import Arena, EvaluationConfig
from tercet.recipes.exporting import AskedConfig
from tercet.recipes.foreign import ForeignModel
from tercet.recipes.foreign_judge import EndpointJudge
from tercet.recipes.rows import Question, gives_comparisons, prompt_columns, questions, some, usable_comparisons
from tercet.recipes.session import Say, Session, open_session
from tercet.recipes.trained import BASE, either_judge_at, judge_place, policy_at
from tercet.rewards.judge import Judge, Verdict
from tercet.rewards.scalar import ScalarJudge

AnyJudge = Judge | ScalarJudge | EndpointJudge
DEFAULT_ROWS, DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE = 100, 64, 1.0
DIFFICULTY = "instruction_difficulty"
"""The column of AlpacaEval's difficulties, which the length-controlled win rate takes into account."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(AskedConfig):
    """Win rate of a policy against another; without a policy, accuracy and calibration of a judge; or, with --export,
    answers for another tool."""

    run: str | None = field(default=None, metadata={"positional": True})
    """The folder of a whole tercet rlhf: its RL policy against its SFT policy, under both of its judges."""
    judge: str | None = None
    """The judge: the folder of a run of tercet preference or tercet reward, or the address of an OpenAI-compatible
    server (…/v1); OPENAI_API_KEY is sent if set."""
    judge_model: str | None = None
    """The same under its name in the training verbs."""
    held_out_judge: str | None = None
    """A second judge, which the policy was not trained against."""
    endpoint_model: str | None = None
    """The model's name at the server, where a judge is an address."""
    endpoint_verdict: Verdict = "soft"
    """How a server's verdict is read: soft takes the probabilities of the letters A and B; hard lets the model give
    its reasons and reads the letter it ends with."""
    baseline: str = BASE
    """The policy it is compared with."""

    def __post_init__(self) -> None:
        if self.judge is not None and self.judge_model is not None and self.judge != self.judge_model:
            raise ConfigError("judge and judge_model are two names of one setting; give one of them")
        if self.endpoint_model is None and any(map(is_address, (self.judge, self.judge_model, self.held_out_judge))):
            raise ConfigError("which model of the server judges? Give --endpoint-model NAME")

    @property
    def first_judge(self) -> str | None:
        """The judge, by whichever name it was given."""
        return self.judge or self.judge_model

    def whole(self) -> MeasureConfig:
        """With the folder of a whole run opened into policies and judges.

        Raises:
            UsageError: There is no judge, or the folder lacks a stage.
        """
        if self.run is None:
            if self.first_judge is None:
                raise UsageError(
                    "which judge? Give --judge-model RUN, --judge http://…/v1, or the folder of a tercet rlhf"
                )
            return replace(self, judge=_place_of(self.first_judge), judge_model=None)
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
            judge=_place_of(self.first_judge or str(root / "preference")),
            judge_model=None,
            held_out_judge=self.held_out_judge or second,
        )


def measure(config: MeasureConfig, *, say: Say = print) -> dict[str, Any]:
    """What `evaluation.json` says: win rates and policies where there is a policy, else judges."""
    config = config.whole()
    assert config.judge is not None
    named = {"preference": config.judge, "held_out": config.held_out_judge}
    places = {name: place for name, place in named.items() if place is not None}
    lying = [place for place in places.values() if not is_address(place)]
    setup = replace(config.setup(config.policy, config.baseline, *lying), skip_bad_rows=config.skip_bad_rows)
    if config.policy is None and not lying and config.model is None:
        setup = replace(setup, model="tiny")  # a server judges by itself; nothing here is asked
    session = open_session(setup, say)
    judges = {name: _judge(session, config, place) for name, place in places.items()}
    found = _judged(session, config, judges) if config.policy is None else _compared(session, config, judges)
    for place, judge in zip(places.values(), judges.values(), strict=True):
        if isinstance(judge, EndpointJudge) and judge.unreadable:
            say(f"{judge.unreadable} of {judge.asked} verdicts of {place} cannot be read and count as ties")
    return found


def is_address(place: str | None) -> bool:
    """Whether a judge is a server's address rather than a folder."""
    return place is not None and place.startswith(("http://", "https://"))


def _place_of(judge: str) -> str:
    return judge if is_address(judge) else judge_place(judge)


def _judge(session: Session, config: MeasureConfig, place: str) -> AnyJudge:
    if not is_address(place):
        what = "judge" if place == config.judge else "held_out_judge"
        return either_judge_at(session, place, what=what)
    assert config.endpoint_model is not None
    return EndpointJudge(ForeignModel(place, config.endpoint_model), verdict=config.endpoint_verdict)


def _compared(session: Session, config: MeasureConfig, judges: Mapping[str, AnyJudge]) -> dict[str, Any]:
    rows = DEFAULT_ROWS if config.rows is None else config.rows
    settings = EvaluationConfig(
        prompts=rows,
        against_chosen=rows,
        max_tokens=DEFAULT_MAX_TOKENS if config.max_tokens is None else config.max_tokens,
        temperature=DEFAULT_TEMPERATURE if config.temperature is None else config.temperature,
    )
    for judge in judges.values():
        if not isinstance(judge, EndpointJudge):
            session.check_room(limit=judge.renderer.limit, answer_tokens=settings.max_tokens)
    arena = Arena(session, settings, _questions(session, config, rows), judges)
    policies = {
        "baseline": policy_at(session, config.baseline, "baseline"),
        "policy": policy_at(session, config.policy),
    }
    session.say(f"{config.policy} against {config.baseline} on {len(arena.questions)} prompts")
    found = arena.report(policies, start="baseline")
    hard = _difficulty(session, config, arena)
    n = len(arena.questions)
    lengths = {name: [_length(each) for each in arena.answers(sampler, n)] for name, sampler in policies.items()}
    for row in found["win_rates"]:
        if row["against"] == "baseline" and n > 1:
            rate = arena.rate(row["judge"], policies["policy"], policies["baseline"], n)
            row |= length_controlled(rate.scores, lengths["policy"], lengths["baseline"], hard).metrics()
    return found


def _length(given: Answer) -> int:
    return sum(len(message.content) for message in given.conversation)


def _difficulty(session: Session, config: MeasureConfig, arena: Arena) -> list[float] | None:
    told = prompt_columns(session, config.data)
    found = [told.get(each.prompt, {}).get(DIFFICULTY) for each in arena.questions]
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return numbers if len(numbers) == len(found) else None


def _judged(session: Session, config: MeasureConfig, judges: Mapping[str, AnyJudge]) -> dict[str, Any]:
    split = config.split("comparisons")
    loaded = data.load_comparisons(config.data, split=split, skip_bad_rows=config.skip_bad_rows)
    session.say(loaded.describe())
    rows = some(loaded.rows, DEFAULT_ROWS if config.rows is None else config.rows, seed=config.seed)
    limits = [judge.renderer.limit for judge in judges.values() if not isinstance(judge, EndpointJudge)]
    if limits:
        rows = usable_comparisons(session, rows, min(limits), "held out")
    return {"judges": {name: agreement(judge, rows).report() for name, judge in judges.items()}}


def _questions(session: Session, config: MeasureConfig, rows: int) -> list[Question]:
    skip = config.skip_bad_rows
    if gives_comparisons(config.data):
        pairs = data.load_comparisons(config.data, split=config.split("comparisons"), skip_bad_rows=skip)
        session.say(pairs.describe())
        return some(questions(pairs.rows), rows, seed=config.seed)
    prompts = data.load_prompts(config.data, split=config.split("prompts"), skip_bad_rows=skip)
    session.say(prompts.describe())
    return some([Question(prompt) for prompt in prompts.rows], rows, seed=config.seed)
