"""From sources to what the loops learn and are tested on; whatever is left out is counted aloud."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tercet import data
from tercet.algorithms.rollouts import RolloutConfig
from tercet.algorithms.steps import PairsConfig
from tercet.data import Loaded
from tercet.data.turns import opening
from tercet.errors import DataError
from tercet.recipes.session import Say, Session, SetupConfig
from tercet.types import Comparison, Conversation, Datum

Row = TypeVar("Row")


@dataclass(frozen=True)
class Question:
    """A held-out prompt, and the answer the data calls the better one, where they have one."""

    prompt: Conversation
    chosen: Conversation | None = None


def train_and_test(
    load: Callable[..., Loaded[Row]], setup: SetupConfig, source: str, test_source: str | None, test_rows: int, say: Say
) -> tuple[list[Row], list[Row]]:
    """Rows to learn and rows held out: from `test_source`, else the source's test split, else set aside by the seed."""
    train = load(source, skip_bad_rows=setup.skip_bad_rows)
    say(train.describe())
    purpose: Literal["comparisons", "conversations"] = (
        "comparisons" if load is data.load_comparisons else "conversations"
    )
    if test_source is not None or "test" in data.splits(source, purpose=purpose):
        split = "test" if "test" in data.splits(test_source or source, purpose=purpose) else "train"
        test = load(test_source or source, split=split, skip_bad_rows=setup.skip_bad_rows)
        say(test.describe())
        return train.rows, some(test.rows, test_rows, seed=setup.seed)
    if len(train.rows) < 2:
        raise DataError(f"{source} gives one row, and one must be held out for the tests; give test_data or more rows")
    kept, held = data.hold_out(train.rows, count=min(test_rows, max(1, len(train.rows) // 10)), seed=setup.seed)
    say(f"{len(held)} of {len(train.rows):,} rows of {source} are held out for tests")
    return kept, held


def some(rows: Sequence[Row], count: int, *, seed: int) -> list[Row]:
    """At most `count` rows, drawn by the seed, in their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in sorted(data.order(len(rows), seed=seed, epoch=0)[:count])]


def gives_comparisons(source: str) -> bool:
    """Whether a source's rows have two answers of which one is better."""
    try:
        data.load_comparisons(source, max_rows=1, skip_bad_rows=True)
    except DataError:
        return False
    return True


def conversation_data(session: Session, rows: Sequence[Conversation], *, train_on: str, max_length: int) -> list[Datum]:
    """Conversations as tokens and weights; those over the limit are left out and counted aloud.

    Raises:
        DataError: None is left, or a conversation has nothing to learn.
    """
    limit = min(max_length, session.engine.context_tokens)
    every = [session.renderer.datum(row, train_on=train_on) for row in rows]
    kept = [datum for datum in every if len(datum.tokens) <= limit]
    count_left_out(session, every, kept, f"conversations have more than {limit} tokens")
    if not kept:
        raise DataError(f"every conversation has more than {limit} tokens; raise max_length")
    return kept


def load_pairs(session: Session, config: PairsConfig) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons to learn, and held out, each shown as one text."""
    rows, test = rows_and_test(session, config)
    return (
        usable_comparisons(session, rows, config.max_length, "to learn"),
        usable_comparisons(session, test, config.max_length, "held out"),
    )


def load_answers(session: Session, config: PairsConfig) -> tuple[list[Comparison], list[Comparison]]:
    """Decided comparisons to learn, and held out, of which either answer is shown by itself."""
    shown = session.answers(config.max_length)

    def show(row: Comparison) -> None:
        shown.tokens(row.prompt, row.a)
        shown.tokens(row.prompt, row.b)

    found = []
    for rows, what in zip(rows_and_test(session, config), ("to learn", "held out"), strict=True):
        decided = [row for row in rows if row.label in ("A", "B")]
        count_left_out(session, rows, decided, f"comparisons {what} are ties")
        found.append(fitting(session, decided, show, what, shown.limit))
    return found[0], found[1]


def rows_and_test(session: Session, config: PairsConfig) -> tuple[list[Comparison], list[Comparison]]:
    """The comparisons that a stage names."""
    return train_and_test(
        data.load_comparisons, session.setup, config.data, config.test_data, config.test_rows, session.say
    )


def usable_comparisons(session: Session, rows: Sequence[Comparison], limit: int, what: str) -> list[Comparison]:
    """Comparisons that fit as one text; see `fitting`."""
    shown = session.comparisons(limit)
    return fitting(session, rows, shown.prompt, what, shown.limit)


def fitting(
    session: Session, rows: Sequence[Comparison], show: Callable[[Comparison], object], what: str, limit: int
) -> list[Comparison]:
    """Comparisons that `show` does not refuse, counted aloud when some do: their answers alone exceed the limit.

    Raises:
        DataError: None fits.
    """
    kept = []
    for row in rows:
        try:
            show(row)
        except DataError:
            continue
        kept.append(row)
    count_left_out(session, rows, kept, f"comparisons {what} have answers too long for {limit} tokens")
    if not kept:
        raise DataError(f"no comparison {what} fits into {limit} tokens; raise max_length")
    return kept


def prompts_to_learn(session: Session, config: RolloutConfig, held_out: Iterable[Question]) -> list[Conversation]:
    """What the policy answers in training: prompts that fit beside an answer and begin like none that is held out.

    Raises:
        DataError: None is left.
    """
    loaded = data.load_prompts(config.data, skip_bad_rows=session.setup.skip_bad_rows)
    session.say(loaded.describe())
    taken = {opening(each.prompt) for each in held_out}
    fresh = [row for row in loaded.rows if opening(row) not in taken]
    count_left_out(session, loaded.rows, fresh, "prompts begin like held-out ones")
    limit = min(config.max_prompt_length, session.engine.context_tokens - config.max_tokens)
    kept = [row for row in fresh if len(session.renderer.generation_prompt(row)) <= limit]
    count_left_out(session, fresh, kept, f"prompts have more than {limit} tokens")
    if not kept:
        raise DataError(
            f"{config.data} leaves no prompt to learn: of {len(loaded.rows)}, {len(fresh)} are not held out, and each "
            f"of these has more than {limit} tokens; raise max_prompt_length or give more data"
        )
    return kept


def prompt_columns(session: Session, source: str) -> dict[Conversation, Mapping[str, object]]:
    """What the rows of a source say of their prompts besides, for rewards that ask; of all splits it has."""
    found: dict[Conversation, Mapping[str, object]] = {}
    for split in data.splits(source, purpose="prompts"):
        loaded = data.load_prompts(source, split=split, skip_bad_rows=session.setup.skip_bad_rows)
        found |= dict(zip(loaded.rows, loaded.columns, strict=True))
    return found


def questions(rows: Iterable[Comparison]) -> list[Question]:
    """The distinct prompts of decided comparisons, with their better answers."""
    return list({each.prompt: Question(each.prompt, each.chosen) for each in rows if each.label in ("A", "B")}.values())


def held_out_questions(session: Session, source: str, test_source: str | None, count: int) -> list[Question]:
    """Prompts of a source that are not learned, with better answers where the source has comparisons."""
    args = (session.setup, source, test_source, count, session.say)
    if gives_comparisons(test_source or source) and gives_comparisons(source):
        return questions(train_and_test(data.load_comparisons, *args)[1])
    return [Question(prompt) for prompt in train_and_test(data.load_prompts, *args)[1]]


def rows_sha256(rows: Iterable[object]) -> str:
    """A short hash of what is learned, to know whether it is the same when a run goes on."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def count_left_out(session: Session, before: Sequence[object], after: Sequence[object], why: str) -> None:
    """Say how many rows are left out, and why; nothing when none is."""
    if len(after) < len(before):
        session.say(f"{len(before) - len(after):,} of {len(before):,} {why} and are left out")
