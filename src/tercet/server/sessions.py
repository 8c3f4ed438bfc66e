"""What clients have going: sessions, the models they train, and the samplers they draw from."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from tercet.engine.base import Sampler, Trainer
from tercet.errors import UsageError
from tercet.server.promises import Promise, failure

# A request may overtake the one before it, but not by minutes: then that one is lost.
LOST_AFTER_S = 300.0
# Samplers that a client may hold, most of which make no use of memory; of more, the one unused longest is forgotten.
HELD_SAMPLERS = 1000


@dataclass
class Session:
    """One client."""

    session_id: str
    user_metadata: dict[str, Any] | None
    display_name: str | None
    heard_at: float = field(default_factory=time.monotonic)
    finished: str | None = None
    finished_at: float = math.inf
    models: list[str] = field(default_factory=list)
    samplers: dict[str, None] = field(default_factory=dict)
    """The one unused longest comes first."""
    made_samplers: int = 0
    """They are numbered from 0."""

    def finish(self, reason: str) -> None:
        """It is over."""
        self.finished, self.finished_at = reason, time.monotonic()

    def add(self, sampler_id: str) -> list[str]:
        """Note a new sampler; those that make room for it."""
        self.samplers[sampler_id] = None
        self.made_samplers = max(self.made_samplers, _number(sampler_id) + 1)
        unused = list(self.samplers)[:-HELD_SAMPLERS]
        for each in unused:
            del self.samplers[each]
        return unused

    def had(self, sampler_id: str) -> bool:
        """Whether a client of it may hold this sampler."""
        return self.finished is None and 0 <= _number(sampler_id) < self.made_samplers

    def use(self, sampler_id: str) -> None:
        """Note that its client draws from a sampler."""
        self.heard_at = time.monotonic()
        if sampler_id in self.samplers:
            del self.samplers[sampler_id]
            self.samplers[sampler_id] = None


def _number(sampler_id: str) -> int:
    number = sampler_id.rpartition(":sample:")[2]
    return int(number) if number.isdecimal() else -1


@dataclass(frozen=True)
class _Waiting:
    promise: Promise
    start: Callable[[], None]
    since: float


@dataclass
class Model:
    """A model in training. Its requests are done by their number, not as they arrive."""

    model_id: str
    session_id: str
    base_model: str
    lora_rank: int | None = None
    trainer: Trainer | None = None
    """None until it is made, and after it is closed."""
    asked_at: str = ""
    """When a client last asked for something of it."""
    next_seq: int = 1
    waiting: dict[int, _Waiting] = field(default_factory=dict)

    def trained(self) -> Trainer:
        """The trainer.

        Raises:
            UsageError: It could not be made, or its session is over.
        """
        if self.trainer is None:
            raise UsageError(f"{self.model_id} is not there: it could not be made, or its session is over")
        return self.trainer

    def in_order(self, seq_id: int, promise: Promise, start: Callable[[], None]) -> None:
        """Start a request once all with smaller numbers have been started."""
        self.waiting[seq_id] = _Waiting(promise, start, time.monotonic())
        if seq_id < self.next_seq:
            del self.waiting[seq_id]
            promise.keep(failure(f"{self.model_id} has done its request {seq_id} already, and it was another one"))
        while self.next_seq in self.waiting:
            self.waiting.pop(self.next_seq).start()
            self.next_seq += 1

    def let_go(self) -> list[Promise]:
        """What waits for a request before it, which will not be done now."""
        promises = [each.promise for each in self.waiting.values()]
        self.waiting.clear()
        return promises

    def give_up_on_lost(self) -> None:
        """Fail what has waited too long for a request that never came: without it, it would learn something else."""
        if not self.waiting or time.monotonic() - min(each.since for each in self.waiting.values()) < LOST_AFTER_S:
            return
        said = f"request {self.next_seq} of {self.model_id} never came, and those after it cannot be done"
        self.next_seq = max(self.waiting) + 1
        for promise in self.let_go():
            promise.keep(failure(said, "server"))


@dataclass
class SamplerEntry:
    """Weights to draw from, as a client holds them."""

    sampler_id: str
    session_id: str
    base_model: str
    model_path: str | None
    weights: Hashable
    """Which weights: entries that have this in common are drawn from together."""


class Samplers:
    """Frozen weights in memory: those from disk are read again when they are needed, the others exist only here.

    Kept by the thread of the engine, dropped by that of the event loop.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: dict[Hashable, tuple[str, Sampler]] = {}
        self._lock = threading.Lock()

    def keep(self, weights: Hashable, sampler: Sampler, owner: str = "") -> None:
        """Put a sampler in.

        Where there are too many, whoever keeps most makes room with the one of theirs that was unused longest, so that
        nobody's many samplers cost another's only one.

        Args:
            weights: What it draws from.
            sampler: Draws from it.
            owner: The session that alone has these weights; empty for those that can be read again.
        """
        with self._lock:
            self._kept.pop(weights, None)
            self._kept[weights] = owner, sampler
            while len(self._kept) > self.most:
                [(most, _)] = Counter(owner for owner, _ in self._kept.values()).most_common(1)
                del self._kept[next(weights for weights, (owner, _) in self._kept.items() if owner == most)]

    def get(self, weights: Hashable, make: Callable[[], Sampler]) -> Sampler:
        """The sampler of these weights, read when it is not there."""
        with self._lock:
            found = self._kept.pop(weights, None)
            if found is not None:
                self._kept[weights] = found
                return found[1]
        sampler = make()
        self.keep(weights, sampler)
        return sampler

    def drop(self, weights: Hashable) -> None:
        """Take one out."""
        with self._lock:
            self._kept.pop(weights, None)

    def __len__(self) -> int:
        return len(self._kept)
