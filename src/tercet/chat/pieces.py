"""Which pieces of a rendered conversation are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Literal, get_args

from tercet.errors import ConfigError, DataError
from tercet.types import Conversation, Datum

TrainOn = Literal[
    "all_assistant_messages",
    "last_assistant_message",
    "last_assistant_turn",
    "all_messages",
    "all_tokens",
    "all_user_and_system_messages",
    "customized",
]
TRAIN_ON: tuple[str, ...] = get_args(TrainOn)

Termination = Literal["stop", "eos", "malformed"]
"""How a sampled answer ended: by one of the renderer's stops, by the tokenizer's EOS, or in neither way."""


@dataclass(frozen=True)
class Piece:
    """Tokens that are learned, or not learned, together.

    `message` is the index of the message whose content and stop these are; None marks what the renderer itself writes:
    headers, BOS, white space between turns.
    """

    tokens: tuple[int, ...]
    message: int | None = None


def learned_messages(conversation: Conversation, train_on: str) -> frozenset[int]:
    """Indices of the messages that `train_on` chooses.

    `last_assistant_turn` is every assistant message after the last user message. `customized` reads
    `Message.trainable`, None counting as no.

    Raises:
        ConfigError: `train_on` is not in `TRAIN_ON`.
    """
    roles = [message.role for message in conversation]
    assistants = [i for i, role in enumerate(roles) if role == "assistant"]
    match train_on:
        case "all_assistant_messages":
            return frozenset(assistants)
        case "last_assistant_message":
            return frozenset(assistants[-1:])
        case "last_assistant_turn":
            last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
            return frozenset(i for i in assistants if i > last_user)
        case "all_messages" | "all_tokens":
            return frozenset(range(len(roles)))
        case "all_user_and_system_messages":
            return frozenset(i for i, role in enumerate(roles) if role in ("user", "system"))
        case "customized":
            return frozenset(i for i, message in enumerate(conversation) if message.trainable)
    raise ConfigError(f"train_on is {train_on!r}{did_you_mean(train_on, TRAIN_ON)}")


def learn(pieces: Sequence[Piece], conversation: Conversation, *, train_on: str, limit: int | None) -> Datum:
    """The pieces as one sequence, weight 1 on what `train_on` chooses and 0 elsewhere.

    Raises:
        ConfigError: `train_on` is not in `TRAIN_ON`.
        DataError: Nothing would be learned, or there are more than `limit` tokens.
    """
    learned = learned_messages(conversation, train_on)
    tokens = tuple(chain.from_iterable(piece.tokens for piece in pieces))
    weights: list[float] = []
    for piece in pieces:
        weight = float(train_on == "all_tokens" or piece.message in learned)
        weights.extend([weight] * len(piece.tokens))
    weights[:1] = [0.0] * len(weights[:1])  # the first token is predicted from nothing
    if not any(weights):
        raise DataError(
            f"{named(conversation)}: no token is learned with train_on={train_on}; its messages are "
            f"{', '.join(message.role for message in conversation) or 'none'}. Drop it or train on other messages"
        )
    if limit is not None and len(tokens) > limit:
        raise DataError(
            f"{named(conversation)}: {len(tokens)} tokens, and the limit is {limit}. "
            "Drop it, shorten it or raise the limit"
        )
    return Datum(tokens=tokens, weights=tuple(weights))


def named(conversation: Conversation) -> str:
    """How an error message speaks of a conversation: by its first words."""
    if not conversation:
        return "an empty conversation"
    first = conversation[0]
    start = " ".join(first.content.split())
    return f"the conversation that begins {first.role}: {start[:60] + '…' if len(start) > 60 else start!r}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error message about a name that is not in `known`."""
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    guess = f"; did you mean {near[0]}?" if near else ";"
    return f"{guess} It can be {', '.join(known)}"
