"""Who is next: one thread does what the engine is asked, the event loop decides in which order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tercet.engine.base import Sampler
from tercet.server.promises import Answer, Promise
from tercet.server.sampling import Draw, draw_together, failed
from tercet.server.sessions import Model
from tercet.server.wire import LearnRequest

# A burst of requests comes one HTTP request at a time: the first would otherwise be decoded alone, at the cost of all.
# They are waited for as long as they keep coming, but not for long.
QUIET_S, GATHER_S = 0.015, 0.5


@dataclass
class _Group:
    """Requests to sample that one call answers."""

    sampler: Callable[[], Sampler]
    first_at: float
    last_at: float
    draws: list[Draw] = field(default_factory=list)

    def ripe_at(self) -> float:
        return min(self.last_at + QUIET_S, self.first_at + GATHER_S)


@dataclass(frozen=True)
class _Job:
    at: float
    promise: Promise
    work: Callable[[], Answer]


class Schedule:
    """The queue in front of the engine: oldest first, and samples that can be drawn together as one."""

    def __init__(self) -> None:
        self.jobs: deque[_Job] = deque()
        self.groups: dict[Hashable, _Group] = {}
        self.calls = 0
        """How often the engine was asked to sample."""
        self._news = asyncio.Event()
        # Everything the engine does happens in this one thread.
        self._thread = ThreadPoolExecutor(1, "engine")

    def submit(self, promise: Promise, work: Callable[[], Answer]) -> None:
        """Do the work when it is its turn; jobs are done in the order they are submitted."""
        self.jobs.append(_Job(time.monotonic(), promise, work))
        self._news.set()

    def draw(self, weights: Hashable, sampler: Callable[[], Sampler], draw: Draw) -> None:
        """Sample when it is its turn, together with what waits for the same weights and settings."""
        now = time.monotonic()
        group = self.groups.setdefault((weights, draw.params, draw.n), _Group(sampler, now, now))
        group.last_at = now
        group.draws.append(draw)
        self._news.set()

    def drop(self, unwanted: Callable[[Promise], bool]) -> list[Promise]:
        """Take out samples that wait and are not wanted any more."""
        dropped: list[Promise] = []
        for key, group in list(self.groups.items()):
            dropped += [draw.promise for draw in group.draws if unwanted(draw.promise)]
            group.draws = [draw for draw in group.draws if not unwanted(draw.promise)]
            if not group.draws:
                del self.groups[key]
        return dropped

    @property
    def waiting_samples(self) -> int:
        """Samples that have not begun."""
        return sum(draw.n for group in self.groups.values() for draw in group.draws)

    async def run(self) -> None:
        """Work for ever."""
        while True:
            self._news.clear()
            oldest = min(self.groups, key=lambda key: self.groups[key].first_at, default=None)
            group = None if oldest is None else self.groups[oldest]
            if self.jobs and (group is None or self.jobs[0].at <= group.first_at or group.ripe_at() > time.monotonic()):
                job = self.jobs.popleft()
                [found] = await self._in_thread(lambda job=job: [_done(job)])  # type: ignore[misc]
                job.promise.keep(found)
            elif group is not None and group.ripe_at() <= time.monotonic():
                del self.groups[oldest]
                self.calls += 1
                answers = await self._in_thread(lambda group=group: draw_together(group.sampler, group.draws))  # type: ignore[misc]
                for draw, found in zip(group.draws, answers, strict=True):
                    draw.promise.keep(found)
            else:
                pause = None if group is None else max(0.0, group.ripe_at() - time.monotonic())
                try:
                    await asyncio.wait_for(self._news.wait(), pause)
                except TimeoutError:
                    continue

    async def _in_thread(self, work: Callable[[], Sequence[Answer]]) -> Sequence[Answer]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Backlog:
    """Data to learn from that wait, with what is being learned."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._sizes: dict[Promise, int] = {}

    def has_room(self, model: Model, seq_id: int) -> bool:
        """Whether one more may come. One that others wait for always may, as may one that came before."""
        came, missing = seq_id < model.next_seq or seq_id in model.waiting, bool(model.waiting)
        return came or (missing and seq_id == model.next_seq) or self.bytes < self.most_bytes

    def add(self, request: LearnRequest, promise: Promise) -> Promise:
        """Count a request until its promise is kept, or forgotten."""
        self._sizes[promise] = request.size
        return promise

    @property
    def bytes(self) -> int:
        """How much there is of it."""
        self._sizes = {promise: size for promise, size in self._sizes.items() if not promise.done.is_set()}
        return sum(self._sizes.values())


def _done(job: _Job) -> Answer:
    try:
        return job.work()
    except Exception as error:
        return failed(error)
