"""Answers that come later: what a client asks for by `request_id` until it is there, and for a while after."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

JSON, PROTOBUF = "application/json", "application/x-protobuf"


@dataclass(frozen=True)
class Answer:
    """What a request came to."""

    content: bytes
    media_type: str = JSON


def answer(**fields: Any) -> Answer:
    """An answer in JSON."""
    return Answer(json.dumps(fields).encode())


def failure(message: str, category: Literal["user", "server"] = "user") -> Answer:
    """A failed request, in the shape that the SDK raises RequestFailedError from; `user` is not tried again."""
    return answer(error=message, category=category)


@dataclass(eq=False)
class Promise:
    """One request on its way."""

    request_id: str
    key: Hashable
    session_id: str
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None
    answered_at: float = 0.0
    fetched_at: float | None = None

    def keep(self, found: Answer) -> None:
        """Answer it; the first answer stays."""
        if self.answer is None:
            self.answer, self.answered_at = found, time.monotonic()
            self.done.set()


class Promises:
    """Every promise that may still be asked for. A request that is sent again meets its own promise."""

    def __init__(self, *, kept_s: float, kept_unfetched_s: float) -> None:
        """Make an empty table.

        Args:
            kept_s: How long an answer stays after it was first fetched: the reply may have been lost on the way.
            kept_unfetched_s: How long one stays that nobody fetched.
        """
        self.kept_s, self.kept_unfetched_s = kept_s, kept_unfetched_s
        self.by_id: dict[str, Promise] = {}
        self.by_key: dict[Hashable, Promise] = {}

    def of(self, key: Hashable, session_id: str) -> tuple[Promise, bool]:
        """The promise of a request, and whether it is new."""
        if key in self.by_key:
            return self.by_key[key], False
        promise = Promise(uuid.uuid4().hex, key, session_id)
        self.by_id[promise.request_id] = self.by_key[key] = promise
        return promise, True

    def get(self, request_id: str) -> Promise | None:
        """The promise of this id, if it is still there."""
        return self.by_id.get(request_id)

    def forget(self, promise: Promise) -> None:
        """Take a promise away; whoever asks for it learns that it expired."""
        self.by_id.pop(promise.request_id, None)
        self.by_key.pop(promise.key, None)
        promise.done.set()

    def tidy(self) -> None:
        """Forget answers that were kept long enough."""
        now = time.monotonic()
        for promise in list(self.by_id.values()):
            if promise.answer is None:
                continue
            fetched = promise.fetched_at
            if now - promise.answered_at > self.kept_unfetched_s or (
                fetched is not None and now - fetched > self.kept_s
            ):
                self.forget(promise)
