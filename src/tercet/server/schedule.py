"""Who is next: one thread does what the engine is asked, the event loop decides in which order."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Literal

from tercet.engine.base import Sampler
from tercet.server.promises import Answer, Promise
from tercet.server.sampling import Draw, draw_together, failed
from tercet.server.sessions import Model
from tercet.server.wire import LearnRequest

# A burst of requests comes one HTTP request at a time: the first would otherwise be decoded alone, at the cost of all.
# They are waited for as long as they keep coming, but not for long.
QUIET_S, GATHER_S = 0.015, 0.5
# What one call draws at most, so that others get their turn: four times what an engine that decodes 128 rows side by
# side draws of usual answers, and never fewer samples than fill its rows four times, of which the short ones make room.
CALL_TOKENS, CALL_SAMPLES = 4 * 128 * 512, 4 * 128


@dataclass
class _Group:
    """Requests to sample that can be drawn together."""

    sampler: Callable[[], Sampler]
    first_at: float
    last_at: float
    draws: list[Draw] = field(default_factory=list)
    had: dict[str, int] = field(default_factory=dict)
    """How many of each session's requests were taken."""

    @property
    def most(self) -> int:
        """How many of them one call takes."""
        samples = max(CALL_SAMPLES, CALL_TOKENS // self.draws[0].params.max_tokens)
        return math.ceil(samples / self.draws[0].n)

    def ripe_at(self) -> float:
        if len(self.draws) >= self.most:
            return self.first_at
        return min(self.last_at + QUIET_S, self.first_at + GATHER_S)

    def take(self) -> list[Draw]:
        """What one call draws of them, of whoever asked in turn; who comes late begins with those who had least."""
        waiting = {draw.promise.session_id for draw in self.draws}
        least = min((self.had[session] for session in waiting if session in self.had), default=0)
        self.had = {session: self.had.get(session, least) for session in waiting}
        asked = dict(self.had)

        def turn(draw: Draw) -> int:
            asked[draw.promise.session_id] += 1
            return asked[draw.promise.session_id]

        most, in_turn = self.most, sorted(self.draws, key=turn)
        for draw in in_turn[:most]:
            self.had[draw.promise.session_id] += 1
        self.draws = in_turn[most:]
        return in_turn[:most]


Kind = Literal["learns", "saves", "other"]


@dataclass(frozen=True)
class _Job:
    at: float
    promise: Promise
    work: Callable[[], Answer]
    model_id: str
    kind: Kind


class Schedule:
    """The queue in front of the engine: oldest first, and samples that can be drawn together as one."""

    def __init__(self) -> None:
        self.jobs: deque[_Job] = deque()
        self.groups: dict[Hashable, _Group] = {}
        self.calls = 0
        """How often the engine was asked to sample."""
        self.drawn = 0
        """How many requests that answered."""
        self.waiting_samples = 0
        """Samples that have not begun."""
        self._news = asyncio.Event()
        self.drawing: list[Draw] = []
        """What the engine samples now."""
        self._left: set[Promise] = set()
        """Those of them that are not wanted any more."""
        # Everything the engine does happens in this one thread.
        self._thread = ThreadPoolExecutor(1, "engine")
        self._doing: Future[Sequence[Answer]] | None = None

    def submit(self, promise: Promise, work: Callable[[], Answer], *, model_id: str = "", kind: Kind = "other") -> None:
        """Do the work when it is its turn; jobs are done in the order they are submitted.

        Args:
            promise: Its answer to be.
            work: What the engine's thread does.
            model_id: The model it is about.
            kind: Whether it changes only the model, or writes what outlives it.
        """
        self.jobs.append(_Job(time.monotonic(), promise, work, model_id, kind))
        self._news.set()

    def draw(self, weights: Hashable, sampler: Callable[[], Sampler], draw: Draw) -> None:
        """Sample when it is its turn, together with what waits for the same weights and settings."""
        now = time.monotonic()
        group = self.groups.setdefault((weights, draw.params, draw.n), _Group(sampler, now, now))
        group.last_at = now
        group.draws.append(draw)
        self.waiting_samples += draw.n
        self._news.set()

    def drop(self, unwanted: Callable[[Promise], bool]) -> list[Promise]:
        """Take out samples that are not wanted any more: those that wait, and a call of which no other is wanted."""
        begun = [draw.promise for draw in self.drawing if not draw.promise.done.is_set()]
        self._left.update(promise for promise in begun if unwanted(promise))
        dropped = begun if self._left.issuperset(begun) else []
        for key, group in list(self.groups.items()):
            gone = [draw for draw in group.draws if unwanted(draw.promise)]
            dropped += [draw.promise for draw in gone]
            self.waiting_samples -= sum(draw.n for draw in gone)
            group.draws = [draw for draw in group.draws if not unwanted(draw.promise)]
            if not group.draws:
                del self.groups[key]
        return dropped

    def drop_learning(self, session_id: str) -> list[Promise]:
        """Take out what a session's models wait to learn, but for what a save behind it is to write."""
        saved: set[str] = set()
        stay: deque[_Job] = deque()
        dropped: list[Promise] = []
        for job in reversed(self.jobs):
            if job.kind == "saves":
                saved.add(job.model_id)
            if job.kind == "learns" and job.promise.session_id == session_id and job.model_id not in saved:
                dropped.append(job.promise)
            else:
                stay.appendleft(job)
        self.jobs = stay
        return dropped

    async def run(self) -> None:
        """Work for ever."""
        while True:
            self._news.clear()
            now = time.monotonic()
            ripe = [key for key, group in self.groups.items() if group.ripe_at() <= now]
            oldest = min(ripe, key=lambda key: self.groups[key].first_at, default=None)
            group = None if oldest is None else self.groups[oldest]
            if self.jobs and (group is None or self.jobs[0].at <= group.first_at):
                job = self.jobs.popleft()
                [found] = await self._in_thread(lambda job=job: [_done(job)])  # type: ignore[misc]
                job.promise.keep(found)
            elif group is not None:
                self.drawing = draws = group.take()
                if not group.draws:
                    del self.groups[oldest]
                self.calls, self.drawn = self.calls + 1, self.drawn + len(draws)
                self.waiting_samples -= sum(draw.n for draw in draws)
                answers = await self._in_thread(lambda group=group, draws=draws: draw_together(group.sampler, draws))  # type: ignore[misc]
                for draw, found in zip(draws, answers, strict=True):
                    draw.promise.keep(found)
                self.drawing = []
                self._left.clear()
                # The others wait as if they had just come.
                group.first_at = time.monotonic()
            else:
                pause = min((group.ripe_at() - now for group in self.groups.values()), default=None)
                try:
                    await asyncio.wait_for(self._news.wait(), pause)
                except TimeoutError:
                    continue

    async def _in_thread(self, work: Callable[[], Sequence[Answer]]) -> Sequence[Answer]:
        self._doing = self._thread.submit(work)
        return await asyncio.wrap_future(self._doing)

    def rests_within(self, seconds: float) -> bool:
        """Whether the engine, which nobody can interrupt, is done by then with what it has begun."""
        return self._doing is None or not wait([self._doing], seconds).not_done


class Backlog:
    """Data to learn from that wait, with what is being learned."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._sizes: dict[Promise, int] = {}

    def has_room(self, model: Model, seq_id: int) -> bool:
        """Whether one more may come. One that others wait for always may, as may one that came before.

        Where one session's data fill it, be it that they wait for a request that never comes, every other one still has
        its share.
        """
        came, missing = seq_id < model.next_seq or seq_id in model.waiting, bool(model.waiting)
        return came or (missing and seq_id == model.next_seq) or self._fits(model.session_id)

    def _fits(self, session_id: str) -> bool:
        if self.bytes < self.most_bytes:
            return True
        if self.bytes >= 2 * self.most_bytes:
            return False
        sessions = {promise.session_id for promise in self._sizes} | {session_id}
        own = sum(size for promise, size in self._sizes.items() if promise.session_id == session_id)
        return own < self.most_bytes / len(sessions)

    def add(self, request: LearnRequest, promise: Promise) -> Promise:
        """Count a request until its promise is kept, or forgotten."""
        self._sizes[promise] = request.size
        return promise

    @property
    def bytes(self) -> int:
        """How much there is of it."""
        self.tidy()
        return sum(self._sizes.values())

    def tidy(self) -> None:
        """Let go of what is done."""
        self._sizes = {promise: size for promise, size in self._sizes.items() if not promise.done.is_set()}


def _done(job: _Job) -> Answer:
    try:
        return job.work()
    except Exception as error:
        return failed(error)
