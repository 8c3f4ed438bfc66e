"""Several answers to one prompt, as they lie in files: our rows and those of REBEL's published pipeline.

::

    ours        prompt, prompt_tokens, completions: [{text, tokens, logprobs, stop_reason, reward}]
    published   prompt, response_0, response_1, …, response_0_reward, …; beside them response_0_tokens and so on

A cell without a value, as tables have it where rows differ in length, stands for no answer. What else a row says, of
itself or of an answer, is kept. Pairs have one form, the published one: prompt, chosen, reject, chosen_reward,
reject_reward, and the token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tercet.data.files import Unreadable
from tercet.data.sources import open_source
from tercet.data.turns import BadRow, Row, answer_turns, ends_with_user, messages, number, prompt_turns
from tercet.errors import DataError
from tercet.types import Conversation, Message, as_messages

Columns = Literal["tercet", "published"]
_SIDES = {"chosen": ("chosen",), "reject": ("reject", "rejected")}
_OF_GROUP = ("prompt", "prompt_tokens", "completions")
_OF_ANSWER = ("text", "tokens", "logprobs", "stop_reason", "reward", "after")
_PUBLISHED = re.compile(r"response_(\d+)(?:_(?!text$)(.+))?")
"""Number of an answer, and what a column says of it; without the latter, its text."""


@dataclass(frozen=True)
class Sampled:
    """One answer, with whatever is known of it."""

    text: str
    tokens: tuple[int, ...] | None = None
    """As it was sampled, stop included."""
    logprobs: tuple[float, ...] | None = None
    stop_reason: str | None = None
    reward: float | None = None
    after: Conversation = ()
    """What was said after it, where a dialogue went on; its reward is that of the whole."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """What else the row says of it."""

    @property
    def conversation(self) -> Conversation:
        """The answer, and what came after it."""
        return (Message("assistant", self.text), *self.after)

    def row(self) -> dict[str, Any]:
        """What a file says of it; nothing of what is not known."""
        known = {
            "text": self.text,
            "tokens": None if self.tokens is None else list(self.tokens),
            "logprobs": None if self.logprobs is None else list(self.logprobs),
            "stop_reason": self.stop_reason,
            "reward": self.reward,
            "after": as_messages(self.after) or None,
            **self.columns,
        }
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """A prompt and its answers."""

    prompt: Conversation
    answers: tuple[Sampled, ...]
    prompt_tokens: tuple[int, ...] | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
    """What else the row says."""

    def row(self, columns: Columns = "tercet") -> dict[str, Any]:
        """The group as a row of a file."""
        tokens = {} if self.prompt_tokens is None else {"prompt_tokens": list(self.prompt_tokens)}
        if columns == "tercet":
            own = {"prompt": as_messages(self.prompt), **tokens, "completions": [each.row() for each in self.answers]}
            return {**own, **self.columns}
        flat: dict[str, Any] = {"prompt": plain(self.prompt), **tokens}
        for i, each in enumerate(self.answers):
            told = each.row()
            flat[f"response_{i}"] = told.pop("text")
            flat |= {f"response_{i}_{name}": value for name, value in told.items()}
        return {**flat, **self.columns}


def load_groups(source: str, *, split: str = "train") -> list[Group]:
    """The groups of a file, a directory or a data set of the hub.

    Raises:
        DataError: There is no such source, or a row is none of the two kinds; names the row.
    """
    return [group_of(row, where) for where, row in _rows(source, split)]


def group_of(row: Row, where: str) -> Group:
    """A group from a row.

    Raises:
        DataError: It is none; `where` names it.
    """
    try:
        flat = _flat(row)
        if row.get("completions") is not None:
            listed = row["completions"]
            if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
                raise BadRow("'completions' must be a list of objects with text")
            answers = tuple(_sampled(each) for each in listed)
        elif flat:
            answers = tuple(_sampled(each) for each in flat.values())
        else:
            raise BadRow("no answers: it has neither 'completions' nor 'response_0'")
        if not answers:
            raise BadRow("'completions' is empty")
        rest = {key: value for key, value in row.items() if key not in _OF_GROUP and not _PUBLISHED.fullmatch(key)}
        return Group(prompt_turns(row), answers, _tokens(row, "prompt_tokens"), rest)
    except BadRow as error:
        raise DataError(
            f"{where}: {error}. Its columns: {', '.join(row) or 'none'}; answers are read as prompt with completions, "
            "as tercet generate writes them, or as prompt with response_0, response_1 and so on"
        ) from error


@dataclass(frozen=True)
class RankedPair:
    """Two answers to one prompt, the better one called chosen."""

    prompt: Conversation
    chosen: Sampled
    rejected: Sampled
    prompt_tokens: tuple[int, ...] | None = None

    def row(self) -> dict[str, Any]:
        """The pair under the published names; ids beside them."""
        found: dict[str, Any] = {"prompt": plain(self.prompt)}
        if self.prompt_tokens is not None:
            found["prompt_tokens"] = list(self.prompt_tokens)
        for side, each in (("chosen", self.chosen), ("reject", self.rejected)):
            told = each.row()
            found[side] = told.pop("text")
            found |= {f"{side}_{name}": told[name] for name in ("reward", "tokens") if name in told}
        return found


def load_ranked_pairs(source: str, *, split: str = "train") -> list[RankedPair]:
    """Pairs with rewards, from a file, a directory or a data set of the hub.

    Raises:
        DataError: There is no such source or split, or a row is no pair; names the row.
    """
    found = []
    for where, row in _rows(source, split):
        try:
            sides = [_side(row, side) for side in _SIDES]
            found.append(RankedPair(prompt_turns(row), sides[0], sides[1], _tokens(row, "prompt_tokens")))
        except BadRow as error:
            raise DataError(
                f"{where}: {error}. Its columns: {', '.join(row) or 'none'}; a pair is prompt, chosen, reject, "
                "chosen_reward and reject_reward, as tercet prepare writes it"
            ) from error
    return found


def plain(conversation: Conversation) -> str | list[dict[str, str]]:
    """A single turn of the user as text, anything else as turns."""
    if len(conversation) == 1 and conversation[0].role == "user":
        return conversation[0].content
    return as_messages(conversation)


def _rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    for where, row in open_source(source, split=split, purpose="prompts").rows:
        if isinstance(row, Unreadable):
            raise DataError(f"{where}: {row.reason}; mend or remove the row")
        yield where, row


def _flat(row: Row) -> dict[int, dict[str, object]]:
    """The answers of a published row by number: text, and what columns that begin with the answer's name say of it."""
    found: dict[int, dict[str, object]] = {}
    for key, value in row.items():
        match = _PUBLISHED.fullmatch(key)
        if match and value is not None:
            found.setdefault(int(match[1]), {})[match[2] or "text"] = value
    return {i: found[i] for i in sorted(found) if "text" in found[i]}


def _sampled(row: Row) -> Sampled:
    words = row.get("text")
    if not isinstance(words, str):
        raise BadRow(f"an answer is {type(words).__name__}; it must be text")
    logprobs, stop = row.get("logprobs"), row.get("stop_reason")
    tokens = _tokens(row, "tokens")
    return Sampled(
        words,
        tokens,
        tuple(float(value) for value in logprobs) if isinstance(logprobs, list) else None,
        stop if isinstance(stop, str) else None,
        None if row.get("reward") is None else number(row, "reward", finite=False),
        messages(row["after"], "after", sampled=tokens is not None) if row.get("after") else (),
        {key: value for key, value in row.items() if key not in _OF_ANSWER and value is not None},
    )


def _side(row: Row, side: str) -> Sampled:
    name = next((name for name in _SIDES[side] if name in row), side)
    turns = answer_turns(row, name)
    if len(turns) > 1:  # the published rows repeat the prompt
        ends_with_user(turns[:-1], name)
    if turns[-1].role != "assistant":
        raise BadRow(f"'{name}' does not end with a turn of the assistant")
    return Sampled(turns[-1].content, _tokens(row, f"{name}_tokens"), reward=number(row, f"{name}_reward"))


def _tokens(row: Row, column: str) -> tuple[int, ...] | None:
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(each, int) for each in value):
        raise BadRow(f"'{column}' must be a list of token ids")
    return tuple(value)


def rewarded(group: Group, rewards: list[float]) -> Group:
    """The same group with a reward for each answer."""
    return replace(
        group, answers=tuple(replace(each, reward=r) for each, r in zip(group.answers, rewards, strict=True))
    )
