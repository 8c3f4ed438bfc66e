"""Answers that come later: what a client asks for by `request_id` until it is there, and for a while after."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

JSON, PROTOBUF = "application/json", "application/x-protobuf"
# What a promise takes beside the content of its answer.
PROMISE_BYTES = 1500
# How long the answers of a session that is over are kept; a client that says so asks for none any more.
GRACE_S = 60.0


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
    model_id: str = ""
    """The model in training that it is about; a client that cannot get such an answer has lost its model."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None
    made_at: float = field(default_factory=time.monotonic)
    answered_at: float = 0.0
    fetched_at: float | None = None
    waiting_bytes: int = 0
    """What its request takes until it is answered."""
    changed: Callable[[Promise], None] | None = None
    """Told when it is answered or first fetched."""

    def keep(self, found: Answer) -> None:
        """Answer it; the first answer stays."""
        if self.answer is None:
            self.answer, self.answered_at = found, time.monotonic()
            self.done.set()
            if self.changed is not None:
                self.changed(self)

    def fetched(self) -> None:
        """Note that its answer is handed out."""
        if self.fetched_at is None:
            self.fetched_at = time.monotonic()
            if self.changed is not None:
                self.changed(self)


class Promises:
    """Every promise that may still be asked for. A request that is sent again meets its own promise."""

    def __init__(self, *, kept_s: float, kept_unfetched_s: float, most_bytes: int) -> None:
        """Make an empty table.

        Args:
            kept_s: How long an answer stays after it was first fetched: the reply may have been lost on the way.
            kept_unfetched_s: How long one stays that nobody fetched; one about a model in training stays as long, or
                until a request that its client made after it fetched this one is fetched too.
            most_bytes: What answers may take; beyond, samples that were fetched go first, then those that were not,
                then answers about models, of each the oldest. The newest stays.
        """
        self.kept_s, self.kept_unfetched_s, self.most_bytes = kept_s, kept_unfetched_s, most_bytes
        self.by_id: dict[str, Promise] = {}
        self.by_key: dict[Hashable, Promise] = {}
        self.bytes = 0
        """What answers take."""
        self.waiting_bytes = 0
        """What requests without an answer take, as far as it is counted."""
        # Samples that were fetched, those that were not, and answers about models; the oldest first.
        self._answered: tuple[OrderedDict[Promise, int], ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    def of(self, key: Hashable, session_id: str, model_id: str = "") -> tuple[Promise, bool]:
        """The promise of a request, and whether it is new."""
        if key in self.by_key:
            return self.by_key[key], False
        promise = Promise(uuid.uuid4().hex, key, session_id, model_id, changed=self._changed)
        self.by_id[promise.request_id] = self.by_key[key] = promise
        return promise, True

    def get(self, request_id: str) -> Promise | None:
        """The promise of this id, if it is still there."""
        return self.by_id.get(request_id)

    def wait(self, promise: Promise, size: int) -> None:
        """Count what a request takes until it is answered, or forgotten."""
        promise.waiting_bytes = size
        self.waiting_bytes += size

    def forget(self, promise: Promise) -> None:
        """Take a promise away; whoever asks for it learns that it expired."""
        self._no_longer_waits(promise)
        self._take(promise)
        self.by_id.pop(promise.request_id, None)
        self.by_key.pop(promise.key, None)
        promise.changed = None
        promise.done.set()

    def tidy(self, is_over: Callable[[str], bool] = lambda session_id: False) -> None:
        """Forget answers that were kept long enough, and those of sessions that are over."""
        now = time.monotonic()
        # When the last of the requests was made whose answer was fetched.
        went_on: dict[str, float] = {}
        for promise in (each for each in self._answered[2] if each.fetched_at is not None):
            went_on[promise.model_id] = max(promise.made_at, went_on.get(promise.model_id, 0.0))
        for promise in [each for queue in self._answered for each in queue]:
            fetched = promise.fetched_at
            if (
                is_over(promise.session_id)
                or now - promise.answered_at > self.kept_unfetched_s
                or (
                    fetched is not None
                    and now - fetched > self.kept_s
                    and (not promise.model_id or fetched <= went_on[promise.model_id])
                )
            ):
                self.forget(promise)

    def _changed(self, promise: Promise) -> None:
        self._no_longer_waits(promise)
        self._take(promise)
        assert promise.answer is not None
        size = PROMISE_BYTES + len(promise.answer.content)
        self._answered[2 if promise.model_id else 1 if promise.fetched_at is None else 0][promise] = size
        self.bytes += size
        for queue in self._answered:
            while self.bytes > self.most_bytes and (oldest := next(iter(queue), promise)) is not promise:
                self.forget(oldest)

    def _take(self, promise: Promise) -> None:
        for queue in self._answered:
            self.bytes -= queue.pop(promise, 0)

    def _no_longer_waits(self, promise: Promise) -> None:
        self.waiting_bytes -= promise.waiting_bytes
        promise.waiting_bytes = 0
