"""From the values of a row to turns: one function per kind of value. Whatever does not fit raises `BadRow`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tercet.errors import DataError
from tercet.types import Comparison, Conversation, Label, Message

Row = Mapping[str, object]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""How data sets name the three roles."""

HH_TURN = "\n\nHuman:"


class BadRow(DataError):
    """A row that fits no shape, or not its own; the loader adds file and row."""


@dataclass(frozen=True)
class Dropped:
    """A row, or part of one, that a shape leaves out as known to occur; counted by reason."""

    reason: str


def need(row: Row, column: str) -> object:
    """The value of a column that must be there."""
    if row.get(column) is None:
        raise BadRow(f"'{column}' is {'empty' if column in row else 'missing'}")
    return row[column]


def text(row: Row, column: str) -> str:
    """The words in a column that must hold some."""
    value = need(row, column)
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {_kind(value)}; it must be text")
    if not value.strip():
        raise BadRow(f"'{column}' is empty")
    return value


def optional_text(row: Row, column: str) -> str:
    """The words in a column that may be absent or empty."""
    return text(row, column) if row.get(column) not in (None, "") and str(row[column]).strip() else ""


def integer(row: Row, column: str) -> int:
    """A whole number."""
    value = _number(need(row, column))
    if value is None or not math.isfinite(value) or value != int(value):
        raise BadRow(f"'{column}' is {row[column]!r:.40}; it must be a whole number")
    return int(value)


def number(row: Row, column: str, *, finite: bool = True) -> float:
    """A number; infinite, or none at all (NaN), only where that is asked for."""
    value = _number(need(row, column))
    if value is None or (finite and not math.isfinite(value)):
        raise BadRow(f"'{column}' is {row[column]!r:.40}; it must be a number")
    return value


def _number(value: object) -> float | None:
    """Files of comma-separated values hold it as text."""
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def message(value: object, *, sampled: bool = False) -> Message | None:
    """One turn, as role and content or as from and value; None for a system turn without words, which says nothing.

    A turn of the assistant may be without words where it was sampled: a policy can end at once.
    """
    if not isinstance(value, Mapping):
        raise BadRow(f"a turn is {_kind(value)}; it must hold role and content, or from and value")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if role not in ROLES:
        raise BadRow(f"a turn has the role {role!r:.40}; known are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise BadRow(f"a turn of {role} is {_kind(content)}; it must be text")
    if not content.strip():
        if ROLES[str(role)] == "system":
            return None
        if not (sampled and ROLES[str(role)] == "assistant"):
            raise BadRow(f"a turn of {role} is empty")
    trainable = value.get("trainable")
    return Message(ROLES[str(role)], content, trainable if isinstance(trainable, bool) else None)


def messages(value: object, column: str = "messages", *, sampled: bool = False) -> Conversation:
    """A list of turns; `sampled` as in `message`."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{column}' is {_kind(value)}; it must be a list of turns")
    return tuple(turn for turn in (message(each, sampled=sampled) for each in value) if turn is not None)


def has_tokens(row: Row, column: str) -> bool:
    """Whether token ids stand beside a column: then its words are a policy's own, and may be none."""
    found = row.get(f"{column}_tokens")
    return isinstance(found, list) and bool(found)


def prompt_turns(row: Row, column: str = "prompt") -> Conversation:
    """What is asked: text (one turn of the user, or a dialogue as in HH), or turns. Ends with the user."""
    value = need(row, column)
    if isinstance(value, str):
        words = text(row, column)
        turns = hh_turns(words) if words.startswith(HH_TURN) else (Message("user", words),)
        if len(turns) > 1 and turns[-1] == Message("assistant", ""):
            turns = turns[:-1]
    else:
        turns = messages(value, column, sampled=has_tokens(row, column))
    return ends_with_user(turns, column)


def ends_with_user(turns: Conversation, column: str) -> Conversation:
    """The same turns, when somebody can answer them."""
    if not turns or turns[-1].role != "user":
        raise BadRow(f"'{column}' does not end with a turn of the user")
    return turns


def answer_turns(row: Row, column: str) -> Conversation:
    """An answer: text, one turn, or turns."""
    value, sampled = need(row, column), has_tokens(row, column)
    if isinstance(value, str):
        return (Message("assistant", value if sampled else text(row, column)),)
    return messages([value] if isinstance(value, Mapping) else value, column, sampled=sampled)


def hh_turns(words: str) -> Conversation:
    """The turns of a raw HH dialogue, split at every 'Human:' and 'Assistant:' as the published recipe does."""
    head, *pieces = re.split(r"(Human:|Assistant:)", words)
    if head.strip() or not pieces:
        raise BadRow("not a dialogue of 'Human:' and 'Assistant:'")
    roles = {"Human:": "user", "Assistant:": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(pieces[::2], pieces[1::2], strict=True))


def compared(
    prompt: Conversation, first: Conversation, second: Conversation, label: Label = "A"
) -> Iterator[Comparison | Dropped]:
    """One comparison, unless there is nothing to compare."""
    for answer in (first, second):
        if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
            raise BadRow("an answer must begin and end with a turn of the assistant")
    if [turn.content.strip() for turn in first] == [turn.content.strip() for turn in second]:
        yield Dropped("both answers are the same")
    else:
        yield Comparison(prompt, first, second, label)


def opening(conversation: Conversation) -> Conversation:
    """The turns up to the first of the user."""
    for place, turn in enumerate(conversation):
        if turn.role == "user":
            return conversation[: place + 1]
    return conversation


def _joined(blocks: list[object]) -> str:
    words = []
    for block in blocks:
        if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
            raise BadRow("a turn holds something other than text")
        words.append(block["text"])
    return "".join(words)


def _kind(value: object) -> str:
    names = {type(None): "empty", list: "a list", dict: "an object", bool: "true or false", int: "a number"}
    return "an empty list" if value == [] else names.get(type(value), type(value).__name__)
