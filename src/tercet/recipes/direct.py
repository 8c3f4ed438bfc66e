"""Learning from answers that are there already: pairs (`tercet dpo`) and labelled ones (`tercet kto`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tercet import data
from tercet.algorithms.direct import DirectConfig, direct
from tercet.algorithms.pairs import Pair, with_reference
from tercet.algorithms.unpaired import KTOConfig, Labelled, kto, mismatch, sequences, with_references
from tercet.errors import DataError
from tercet.recipes.reference import reference_logprobs, rows_reached
from tercet.recipes.rows import count_left_out, gives_comparisons, rows_sha256, train_and_test
from tercet.recipes.session import Say, Session, SetupConfig, open_session
from tercet.recipes.stages import open_run
from tercet.recipes.trained import check_same_base, weights_at
from tercet.types import Comparison, Conversation, Datum, LabelledAnswer, Weights


@dataclass(frozen=True, kw_only=True)
class DPORunConfig(DirectConfig, SetupConfig):
    """Learn from pairs of answers without sampling: DPO and its family."""

    policy: str = "base"
    """The policy to start from, which is also the reference: the folder of a run, an adapter's directory, or base."""
    out: str = "runs/dpo"
    """Folder of the run; the same command goes on where it stood."""


@dataclass(frozen=True, kw_only=True)
class KTORunConfig(KTOConfig, SetupConfig):
    """Learn from answers that are labelled good or bad one by one."""

    policy: str = "base"
    """The policy to start from, which is also the reference: the folder of a run, an adapter's directory, or base."""
    out: str = "runs/kto"
    """Folder of the run; the same command goes on where it stood."""


def train_dpo(config: DPORunConfig, *, say: Say = print) -> Path:
    """Learn pairs. Returns the run's folder."""
    objective = config.objective()
    check_same_base(config, config.policy)
    start = weights_at(config.policy, "policy")
    session = open_session(config, say)
    rows, test = train_and_test(
        data.load_comparisons, config, config.data, config.test_data, config.test_rows, session.say
    )
    learned = comparison_pairs(session, rows, config.max_length, "to learn")
    tested = comparison_pairs(session, test, config.max_length, "held out")
    longest = max((len(datum.tokens) for pair in learned for datum in pair.data), default=0)
    directory = Path(config.out)
    with open_run(
        session,
        directory,
        "dpo",
        session.config_of(DPORunConfig, config),
        _origin(session, start, [learned, tested]),
        steps=config.steps(len(learned)),
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.pairs_per_step} comparisons, of which there are {len(learned):,}; loss {config.loss}; "
        f"{session.memory(longest_tokens=longest, tied=2)}",
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(init=start, lora=config.adapter, seed=config.seed)
            if objective.needs_reference:
                needed = rows_reached(
                    len(learned), config.steps(len(learned)), config.pairs_per_step, config.epochs, seed=config.seed
                )
                asked = [*(learned[i] for i in needed), *tested]
                flat = [datum for pair in asked for datum in pair.data]
                known = with_reference(asked, reference_logprobs(directory, trainer, flat, say=say))
                for i, pair in zip(needed, known, strict=False):
                    learned[i] = pair
                tested = known[len(needed) :]
            direct(config, learned, tested, trainer=trainer, run=run, seed=config.seed)
    return directory


def train_kto(config: KTORunConfig, *, say: Say = print) -> Path:
    """Learn labelled answers. Returns the run's folder."""
    check_same_base(config, config.policy)
    start = weights_at(config.policy, "policy")
    session = open_session(config, say)
    rows, test = _labelled(session, config)
    learned = labelled_answers(session, rows, config.max_length, "to learn")
    if config.loss == "kto":
        limit = min(config.max_length, session.engine.context_tokens)
        others = mismatch([row.datum for row in learned], limit)
        learned = [replace(row, mismatched=other) for row, other in zip(learned, others, strict=True)]
    tested = labelled_answers(session, test, config.max_length, "held out")
    good = sum(row.desirable for row in learned)
    longest = max((len(row.datum.tokens) for row in learned), default=0)
    session.say(f"{good:,} good answers and {len(learned) - good:,} bad ones to learn")
    directory = Path(config.out)
    with open_run(
        session,
        directory,
        "kto",
        session.config_of(KTORunConfig, config),
        _origin(session, start, [learned, tested]),
        steps=config.steps(len(learned)),
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.rows_per_step} answers, of which there are {len(learned):,}; "
        f"{session.memory(longest_tokens=longest)}",
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(init=start, lora=config.adapter, seed=config.seed)
            needed = rows_reached(
                len(learned), config.steps(len(learned)), config.rows_per_step, config.epochs, seed=config.seed
            )
            asked = [*(learned[i] for i in needed), *tested]
            known = with_references(asked, reference_logprobs(directory, trainer, sequences(asked), say=say))
            for i, row in zip(needed, known, strict=False):
                learned[i] = row
            kto(config, learned, known[len(needed) :], trainer=trainer, run=run, seed=config.seed)
    return directory


def _labelled(session: Session, config: KTORunConfig) -> tuple[list[LabelledAnswer], list[LabelledAnswer]]:
    """Answers to learn and held out. Comparisons are held out whole, so that no prompt is on both sides."""
    where = (config, config.data, config.test_data)
    if not gives_comparisons(config.data):
        learned, tested = train_and_test(data.load_labelled, *where, config.test_rows, session.say)
        return learned, tested
    rows, test = train_and_test(data.load_comparisons, *where, -(-config.test_rows // 2), session.say)
    return _one_by_one(rows), _one_by_one(test)


def _one_by_one(rows: Sequence[Comparison]) -> list[LabelledAnswer]:
    decided = [row for row in rows if row.label in ("A", "B")]
    return [
        LabelledAnswer(row.prompt, answer, good)
        for row in decided
        for answer, good in ((row.chosen, True), (row.rejected, False))
    ]


def _origin(session: Session, start: Weights | None, rows: Sequence[object]) -> dict[str, str]:
    return {"rows_sha256": rows_sha256(rows), "policy_sha256": session.fingerprint(start)}


def answered(session: Session, prompt: Conversation, answer: Conversation) -> Datum:
    """A prompt and its answer, learned where the assistant speaks in the answer."""
    before = tuple(replace(message, trainable=None) for message in prompt)
    after = tuple(replace(message, trainable=message.role == "assistant") for message in answer)
    return session.renderer.datum((*before, *after), train_on="customized")


def comparison_pairs(session: Session, rows: Sequence[Comparison], max_length: int, what: str) -> list[Pair]:
    """Decided comparisons as tokens; ties and pairs with a row over the limit are left out and counted aloud.

    Raises:
        DataError: None is left.
    """
    limit = min(max_length, session.engine.context_tokens)
    decided = [row for row in rows if row.label in ("A", "B")]
    count_left_out(session, rows, decided, f"comparisons {what} are ties")
    every = [
        Pair(answered(session, row.prompt, row.chosen), answered(session, row.prompt, row.rejected)) for row in decided
    ]
    kept = [pair for pair in every if max(len(datum.tokens) for datum in pair.data) <= limit]
    count_left_out(session, every, kept, f"comparisons {what} have an answer that ends beyond {limit} tokens")
    if not kept:
        raise DataError(f"no comparison {what} fits into {limit} tokens; raise max_length")
    return kept


def labelled_answers(session: Session, rows: Sequence[LabelledAnswer], max_length: int, what: str) -> list[Labelled]:
    """Labelled answers as tokens; those over the limit are left out and counted aloud.

    Raises:
        DataError: None is left.
    """
    limit = min(max_length, session.engine.context_tokens)
    every = [Labelled(answered(session, row.prompt, row.answer), row.good) for row in rows]
    kept = [row for row in every if len(row.datum.tokens) <= limit]
    count_left_out(session, every, kept, f"answers {what} end beyond {limit} tokens")
    if not kept:
        raise DataError(f"no answer {what} fits into {limit} tokens; raise max_length")
    return kept
