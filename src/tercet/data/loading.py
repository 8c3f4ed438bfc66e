"""From a source to conversations, comparisons or prompts, with an account of what was found and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from tercet.data.files import Unreadable
from tercet.data.shapes import SHAPES, Shape, recognise
from tercet.data.sources import Purpose, open_source
from tercet.data.turns import BadRow, Dropped, number
from tercet.data.turns import Row as RawRow
from tercet.errors import DataError
from tercet.types import Comparison, Conversation, LabelledAnswer

Row = TypeVar("Row")


@dataclass(frozen=True)
class Loaded(Generic[Row]):
    """Rows, and where they come from."""

    rows: list[Row]
    source: str
    shape: str
    dropped: dict[str, int]
    """Reason -> how many were left out for it."""
    split: str = "train"
    """The name of the split at the source: validation may stand in for test."""
    columns: list[RawRow] = field(default_factory=list)
    """Of each row, the row of the source that it comes from."""

    def describe(self) -> str:
        """What was found, in one line.

        >>> Loaded([1, 2], "hh.jsonl", "raw HH", {"an empty turn": 3}).describe()
        'hh.jsonl (train): raw HH, 2 rows; left out 3: an empty turn 3'
        """
        line = f"{self.source} ({self.split}): {self.shape}, {len(self.rows):,} rows"
        if self.dropped:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items())
            line += f"; left out {sum(self.dropped.values()):,}: {reasons}"
        return line


def load_conversations(
    source: str, *, split: str = "train", skip_bad_rows: bool = False, max_rows: int | None = None
) -> Loaded[Conversation]:
    """Conversations to learn from; of comparisons, the prompt with the better answer.

    Args:
        source: "builtin", a hub id, name:config, a directory or a file.
        split: "train", "test", or a name the source has.
        skip_bad_rows: Leave unusable rows out and count them, instead of failing at the first.
        max_rows: Stop after so many.

    Raises:
        DataError: No such source or split, nothing usable in it, or a row that cannot be used (the message names it).
    """
    return _load(source, split, skip_bad_rows, max_rows, "conversations", _conversation_reader)


def load_comparisons(
    source: str, *, split: str = "train", skip_bad_rows: bool = False, max_rows: int | None = None
) -> Loaded[Comparison]:
    """Comparisons, the better answer first (label "A"), or equally good ones (label "Tie").

    Arguments and errors are those of `load_conversations`.
    """
    return _load(source, split, skip_bad_rows, max_rows, "comparisons", _comparison_reader)


def load_prompts(
    source: str, *, split: str = "train", skip_bad_rows: bool = False, max_rows: int | None = None
) -> Loaded[Conversation]:
    """What a policy answers: conversations that end with a turn of the user, each once.

    Arguments and errors are those of `load_conversations`.
    """
    return _load(source, split, skip_bad_rows, max_rows, "prompts", _prompt_reader)


def load_labelled(
    source: str, *, split: str = "train", skip_bad_rows: bool = False, max_rows: int | None = None
) -> Loaded[LabelledAnswer]:
    """Answers that are labelled good or bad one by one.

    Arguments and errors are those of `load_conversations`.
    """
    return _load(source, split, skip_bad_rows, max_rows, "conversations", _labelled_reader)


Reader = Callable[[RawRow], Iterable[Row | Dropped]]


def _load(
    source: str,
    split: str,
    skip_bad_rows: bool,
    max_rows: int | None,
    purpose: Purpose,
    reader_of: Callable[[Shape, str], Reader[Row]],
) -> Loaded[Row]:
    opened = open_source(source, split=split, purpose=purpose)
    rows: list[Row] = []
    columns: list[RawRow] = []
    dropped: Counter[str] = Counter()
    shape: Shape | None = None
    likely: Shape | None = None
    for where, raw in opened.rows:
        if max_rows is not None and len(rows) >= max_rows:
            break
        try:
            if isinstance(raw, Unreadable):
                raise BadRow(raw.reason)
            if shape is None:
                likely = recognise(raw)
                reader = reader_of(likely, source)
            # A row that turns out bad half-way gives nothing at all; nor does it say what shape the others have.
            found = list(reader(raw))
            shape = likely
        except BadRow as error:
            if not skip_bad_rows:
                raise DataError(_complaint(where, raw, shape or likely, error)) from error
            dropped[str(error)] += 1
            continue
        for item in found:
            if isinstance(item, Dropped):
                dropped[item.reason] += 1
            else:
                rows.append(item)
                columns.append(raw)
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "there are no rows"
        raise DataError(f"{source} ({opened.split}) gives no {purpose}: {reasons}")
    assert shape is not None
    return Loaded(rows[:max_rows], source, shape.name, dict(dropped), opened.split, columns[:max_rows])


def _complaint(where: str, raw: RawRow | Unreadable, shape: Shape | None, error: BadRow) -> str:
    message = f"{where}: {error}. "
    if not isinstance(raw, Unreadable):
        message += f"The row's columns: {', '.join(raw) or 'none'}. "
    if shape is not None:
        message += f"Its shape, {shape.name}, wants {shape.looks}. "
    message += "Mend or remove the row, or pass --skip-bad-rows to leave out and count such rows."
    if shape is None:
        message += "\nKnown shapes:\n" + "\n".join(f"  {known.name}: {known.looks}" for known in SHAPES)
    return message


def _conversation_reader(shape: Shape, source: str) -> Reader[Conversation]:
    read = shape.conversations or (_better_answers(shape.comparisons) if shape.comparisons else None)
    if read is None:
        raise _unfit(shape, source, "conversations", lambda other: other.conversations or other.comparisons)

    def conversations(raw: RawRow) -> Iterator[Conversation | Dropped]:
        for item in read(raw):
            if not isinstance(item, Dropped) and all(turn.role != "assistant" for turn in item):
                raise BadRow("a conversation without a turn of the assistant")
            yield item

    return conversations


def _comparison_reader(shape: Shape, source: str) -> Reader[Comparison]:
    if shape.comparisons is None:
        raise _unfit(shape, source, "comparisons", lambda other: other.comparisons)
    read = shape.comparisons

    def comparisons(raw: RawRow) -> Iterator[Comparison | Dropped]:
        margin = number(raw, "margin") if raw.get("margin") is not None else 0.0
        for item in read(raw):
            yield item if isinstance(item, Dropped) else replace(item, margin=margin)

    return comparisons


def _labelled_reader(shape: Shape, source: str) -> Reader[LabelledAnswer]:
    if shape.labelled is None:
        raise _unfit(shape, source, "labelled answers", lambda other: other.labelled)
    return shape.labelled


def _prompt_reader(shape: Shape, source: str) -> Reader[Conversation]:
    seen: set[Conversation] = set()

    def prompts(raw: RawRow) -> Iterator[Conversation | Dropped]:
        for item in _asked(shape, raw):
            if isinstance(item, Dropped):
                yield item
            elif item in seen:
                yield Dropped("a prompt seen before")
            else:
                seen.add(item)
                yield item

    return prompts


def _asked(shape: Shape, raw: RawRow) -> Iterator[Conversation | Dropped]:
    if shape.prompts is not None:
        yield from shape.prompts(raw)
    elif shape.conversations is not None:
        for item in shape.conversations(raw):
            yield item if isinstance(item, Dropped) else _before_last_answer(item)
    elif shape.comparisons is not None:
        for pair in shape.comparisons(raw):
            yield pair if isinstance(pair, Dropped) else pair.prompt


def _better_answers(
    read: Callable[[RawRow], Iterable[Comparison | Dropped]],
) -> Reader[Conversation]:
    def conversations(raw: RawRow) -> Iterator[Conversation | Dropped]:
        for item in read(raw):
            if isinstance(item, Dropped):
                yield item
            elif item.label == "Tie":
                yield Dropped("a tie: neither answer is better")
            else:
                yield item.prompt + item.chosen

    return conversations


def _before_last_answer(conversation: Conversation) -> Conversation:
    end = len(conversation)
    while end and conversation[end - 1].role != "assistant":
        end -= 1
    # A conversation nobody answered yet is a prompt as it stands.
    end = end or len(conversation)
    while end and conversation[end - 1].role != "user":
        end -= 1
    if not end:
        raise BadRow("a conversation without a turn of the user")
    return conversation[:end]


def _unfit(shape: Shape, source: str, wanted: str, has: Callable[[Shape], object]) -> DataError:
    fit = ", ".join(other.name for other in SHAPES if has(other))
    return DataError(f"{source} has the shape {shape.name}, which gives no {wanted}; shapes that do: {fit}")
