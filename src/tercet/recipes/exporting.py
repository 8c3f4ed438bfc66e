"""A policy's answers to a benchmark's questions, in the file that the benchmark's own tool reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet import data
from tercet.algorithms.policy_gradient import SEEDS_PER_RUN
from tercet.algorithms.rollouts import answer
from tercet.engine.base import Sampler
from tercet.errors import ConfigError, DataError, UsageError
from tercet.evaluation.exports import EXPORTS, Asked, Export, Format, Questions, Told, load_questions
from tercet.recipes.row_files import check_new, write_rows
from tercet.recipes.rows import rows_sha256
from tercet.recipes.session import Say, Session, check_positive, open_session
from tercet.recipes.trained import BASE, TrainedConfig, policy_at
from tercet.types import Conversation, Message, SamplingParams

# As in generating: an answer is a function of (seed, place of the question).
QUESTIONS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class AskedConfig(TrainedConfig):
    """A policy, what it is asked, and how it answers."""

    policy: str | None = None
    """The policy: the folder of a run, an adapter's directory, or base."""
    data: str = "builtin"
    """Prompts, or comparisons; the test split is taken where there is one. For an export, the tool's question file."""
    rows: int | None = None
    """Prompts or comparisons, at most; null takes 100, and all for an export."""
    max_tokens: int | None = None
    """Longest answer in tokens; null is 64, and for an export what the tool takes (2048, 1024 or 4096)."""
    temperature: float | None = None
    """Sampling temperature; null is 1, and for an export the tool's own, for MT-Bench by category."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used and count them, instead of stopping at the first."""
    export: Format | None = None
    """Write the policy's answers to a benchmark's questions into --out, as that tool reads them, and judge nothing."""
    out: Path | None = None
    """A json file for everything that was found, or, of an export, for the answers, whose name is the policy's (jsonl
    for MT-Bench and Arena-Hard); it must not exist. Stopped, an export goes on."""

    def split(self, purpose: Any) -> str:
        """Which split of the data is used."""
        return "test" if "test" in data.splits(self.data, purpose=purpose) else "train"


def export_answers(config: AskedConfig, *, say: Say = print) -> Path:
    """Answer every question, turn by turn, into a file; stopped, it goes on where it stood.

    Raises:
        UsageError: There is no name for the file, or it exists.
        DataError: A row is no question of this benchmark, or does not fit into the model.
    """
    assert config.export is not None
    kind = EXPORTS[config.export]
    if config.out is None:
        raise UsageError(f"where to? Give --out NAME{kind.suffix}; NAME is what {config.export} calls the policy")
    check_new(config.out, (kind.suffix,))
    max_tokens = kind.max_tokens if config.max_tokens is None else config.max_tokens
    check_positive({"max_tokens": max_tokens, "rows": 1 if config.rows is None else config.rows})
    if config.temperature is not None and config.temperature < 0:
        raise ConfigError(f"temperature is {config.temperature}; it must be 0 or above")
    asked = load_questions(
        config.export, config.data, split=config.split("prompts"), rows=config.rows, skip_bad_rows=config.skip_bad_rows
    )
    say(_described(config, asked))
    session = open_session(config.setup(config.policy), say)
    questions = _fitting(session, asked.rows, skip=config.skip_bad_rows)
    answers = Answers(session, policy_at(session, config.policy), kind, max_tokens, config.temperature)
    say(f"{config.policy or BASE} answers {len(questions):,} questions of {config.export}, into {config.out}")
    name = config.out.stem

    def make(at: int, end: int) -> Iterator[dict[str, Any]]:
        part = questions[at:end]
        for question, told in zip(part, answers.to(part, seed=config.seed * SEEDS_PER_RUN + at), strict=True):
            yield kind.write(question, told, name)

    made_of = {
        "export": config.export,
        "max_tokens": max_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "renderer": session.renderer.name,
        "questions_sha256": rows_sha256(questions),
        "policy_sha256": answers.sampler.fingerprint()[:16],
    }
    return write_rows(config.out, made_of, len(questions), make, verb="eval", at_once=QUESTIONS_AT_ONCE)


class Answers:
    """A policy's answers to questions of several turns."""

    def __init__(
        self, session: Session, sampler: Sampler, kind: Export, max_tokens: int, temperature: float | None
    ) -> None:
        """Take a policy and how it is asked; a temperature of None leaves it to the benchmark."""
        self.session, self.sampler, self.kind = session, sampler, kind
        self.max_tokens, self.temperature = max_tokens, temperature

    def to(self, questions: Sequence[Asked], *, seed: int) -> list[list[Told]]:
        """An answer to every turn; each ends at `max_tokens`, or where the model takes no more.

        Where a conversation has filled the model before its last turn, the rest of the answers are empty.
        """
        history: list[Conversation] = [() for _ in questions]
        told: list[list[Told]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            # Those of one temperature and one limit are drawn together.
            together: dict[tuple[float, int], list[int]] = {}
            for i, question in enumerate(questions):
                if turn >= len(question.turns):
                    continue
                history[i] = (*history[i], Message("user", question.turns[turn]))
                room = min(self.max_tokens, _room(self.session, history[i]))
                if room >= 1:
                    together.setdefault((self._temperature(question), room), []).append(i)
                else:
                    told[i].append(Told("", 0))
            for (temperature, room), places in together.items():
                params = SamplingParams(
                    max_tokens=room, temperature=temperature, stop=self.session.renderer.stop, seed=seed + turn
                )
                prompts = [history[i] for i in places]
                found = answer(prompts, self.sampler, self.session.renderer, params, 1)
                for i, [each] in zip(places, found, strict=True):
                    told[i].append(Told(each.message.content, len(each.completion.tokens)))
            for i, question in enumerate(questions):
                if turn < len(question.turns):
                    history[i] = (*history[i], Message("assistant", told[i][turn].words))
        return told

    def _temperature(self, question: Asked) -> float:
        if self.temperature is not None:
            return self.temperature
        return self.kind.temperature if question.temperature is None else question.temperature


def _room(session: Session, conversation: Conversation) -> int:
    return session.engine.context_tokens - len(session.renderer.generation_prompt(conversation))


def _fitting(session: Session, questions: Sequence[Asked], *, skip: bool) -> list[Asked]:
    kept = [each for each in questions if _room(session, (Message("user", each.turns[0]),)) >= 1]
    if len(kept) == len(questions):
        return kept
    context = session.engine.context_tokens
    if not skip or not kept:
        first = next(each for each in questions if each not in kept)
        raise DataError(
            f"the question {first.turns[0]!r:.60} fills the {context} tokens that the model takes; take a model with a "
            "longer context, or pass --skip-bad-rows to leave such questions out"
        )
    session.say(f"{len(questions) - len(kept)} of {len(questions)} questions fill {context} tokens and are left out")
    return kept


def _described(config: AskedConfig, questions: Questions) -> str:
    left_out = f"; left out {questions.left_out:,}" if questions.left_out else ""
    return f"{config.data}: {len(questions.rows):,} questions of {config.export}{left_out}"
