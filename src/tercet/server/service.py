"""What each request does. All of this runs on the event loop; what an engine has to do goes through the schedule."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tercet.engine.base import Sampler, Trainer
from tercet.errors import CheckpointError, TercetError, UsageError
from tercet.server import requests as asked
from tercet.server.learning import learn
from tercet.server.promises import GRACE_S, PROTOBUF, Answer, Promise, Promises, answer, failure
from tercet.server.refusals import Busy, Gone, Missing
from tercet.server.sampling import read_draw
from tercet.server.schedule import Backlog, Kind, Schedule
from tercet.server.served import Limits, Served
from tercet.server.sessions import Model, SamplerEntry, Samplers, Session
from tercet.server.store import Checkpoint, Run, Store, checked_name, now
from tercet.server.wire import LearnRequest
from tercet.types import Weights

LOG = logging.getLogger("tercet.server")
# A client's own time-out is 45 s.
LONG_POLL_S = 38.0
KEPT_S, KEPT_UNFETCHED_S = 120.0, 3600.0
TIDY_EVERY_S = 20.0
# A client says every 10 s that it lives. One that does not is not drawn for; should it come back, it asks again.
SILENT_S = 90.0


class Service:
    """One server's state."""

    def __init__(self, served: Served, store: Store, limits: Limits) -> None:
        self.served, self.store, self.limits = served, store, limits
        self.schedule, self.backlog = Schedule(), Backlog(limits.waiting_mb * 1_000_000)
        self.promises = Promises(
            kept_s=KEPT_S, kept_unfetched_s=KEPT_UNFETCHED_S, most_bytes=limits.answers_mb * 1_000_000
        )
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, Model] = {}
        self.entries: dict[str, SamplerEntry] = {}
        self.samplers = Samplers(limits.samplers)

    async def run(self) -> None:
        """Work for ever."""
        await asyncio.gather(self.schedule.run(), self._tidy_for_ever())

    # Sessions

    def open_session(self, request: asked.CreateSession) -> Session:
        """A new session."""
        session = Session(f"sess-{uuid.uuid4().hex[:20]}", request.user_metadata, request.display_name)
        self.sessions[session.session_id] = session
        return session

    def heard(self, session_id: str) -> Session:
        """The session of this id, which has just been heard of.

        Raises:
            Gone: There is none, or it is over.
        """
        session = self.sessions.get(session_id)
        if session is None or session.finished is not None:
            raise Gone(
                f"the session {session_id} is over, or this server was started after it began; its checkpoints are "
                "kept: open a new session and load one"
            )
        session.heard_at = time.monotonic()
        return session

    def finish(self, session_id: str, reason: str) -> None:
        """End a session: what it trained and drew from is let go. The first reason stays."""
        session = self.sessions.get(session_id)
        if session is None or session.finished is not None:
            return
        session.finish(reason)
        drawing = self.schedule.drop(lambda promise: promise.session_id == session_id)
        for promise in [*drawing, *self.schedule.drop_learning(session_id)]:
            self.promises.forget(promise)
        for sampler_id in list(session.samplers):
            self._drop_entry(sampler_id)
        for model_id in session.models:
            model = self.models.pop(model_id, None)
            if model is not None:
                for promise in model.let_go():
                    self.promises.forget(promise)
                self.schedule.submit(Promise("", None, session_id), lambda model=model: self._let_go(model))  # type: ignore[misc]

    # Models

    def create_model(self, request: asked.CreateModel) -> Promise:
        """Begin to train new weights."""

        def work(model: Model) -> Answer:
            if request.optimizer_config.type != "adamw":
                raise UsageError(f"the optimizer {request.optimizer_config.type!r} is not here; adamw is")
            lora = (request.lora_config or asked.Lora(rank=32)).config()
            seed = 0 if request.lora_config is None else request.lora_config.seed or 0
            model.trainer = self.served.engine.trainer(lora=lora, seed=seed)
            model.lora_rank = lora.rank
            self._begin_run(model, request.user_metadata)
            return answer(model_id=model.model_id, type="create_model")

        return self._create(request.session_id, request.model_seq_id, request.base_model, work)

    def create_model_from(self, request: asked.LoadWeights) -> Promise:
        """Begin to train saved weights; with `optimizer`, exactly where they stood."""

        def work(model: Model) -> Answer:
            saved = self._loadable(request.path)
            model.base_model = self.served.checked(request.base_model) if request.base_model else saved.run.base_model
            model.trainer = self._loaded(saved, optimizer=request.optimizer)
            model.lora_rank = saved.lora_rank
            self._begin_run(model, request.user_metadata)
            return answer(path=request.path, model_id=model.model_id, type="load_weights")

        return self._create(request.session_id or "", request.model_seq_id, request.base_model, work)

    def model(self, model_id: str) -> Model:
        """The model of this id.

        Raises:
            Missing: There is none.
        """
        found = self.models.get(model_id)
        if found is None:
            raise Missing(
                f"there is no model {model_id} in training: it could not be made, its session is over, or this server "
                "was started after it; create a training client from its last checkpoint"
            )
        session = self.sessions.get(found.session_id)
        if session is not None:
            session.heard_at = time.monotonic()
        found.asked_at = now()
        return found

    def learn(self, request: LearnRequest) -> Promise:
        """Add a batch's gradient, or look at it."""

        def work(model: Model) -> Answer:
            tokens = request.tokens()
            if tokens > self.limits.request_tokens:
                raise UsageError(
                    f"the request has {tokens} tokens, and {self.limits.request_tokens} are allowed; send it in "
                    "pieces, whose gradients add up"
                )
            return Answer(learn(model.trained(), request, most_tokens=self.limits.request_tokens), PROTOBUF)

        if not self.backlog.has_room(self.model(request.model_id), request.seq_id):
            raise Busy(f"{self.limits.waiting_mb} MB to learn from wait already; try again in a second")
        return self.backlog.add(request, self._in_order(request.model_id, request.seq_id, work))

    def optim_step(self, request: asked.OptimStep) -> Promise:
        """Use the gradient."""

        def work(model: Model) -> Answer:
            if request.adam_params is None:
                raise UsageError("adam_params is missing; AdamW is the optimizer here")
            done = model.trained().optim_step(request.adam_params.params()).result()
            return answer(
                metrics={"grad_norm": done.grad_norm, "learning_rate": done.learning_rate}, type="optim_step"
            )  # fmt: skip

        return self._in_order(request.model_id, request.seq_id, work)

    def save(self, request: asked.SaveWeights, kind: str) -> Promise:
        """Write a checkpoint, to go on from (`weights`) or to sample from (`sampler_weights`)."""

        def work(model: Model) -> Answer:
            trainer = model.trained()

            def write(directory: Path) -> None:
                trainer.save(directory).result()

            found = self.store.save(
                model.model_id, kind, checked_name(request.path or f"step-{request.seq_id}"), write,
                ttl_seconds=request.ttl_seconds, user_metadata=request.user_metadata, overwrite=request.overwrite,
                lora_rank=model.lora_rank,
            )  # fmt: skip
            self.store.touch(model.model_id, model.asked_at)
            return answer(path=found.path, type="save_weights" if kind == "weights" else "save_weights_for_sampler")

        return self._in_order(request.model_id, request.seq_id, work, "saves")

    def save_sampler(self, request: asked.SaveWeights) -> Promise:
        """A sampler of the weights as they are, kept in memory only."""
        loop = asyncio.get_running_loop()

        def work(model: Model) -> Answer:
            session = self.sessions.get(model.session_id)
            if session is None or session.finished is not None:
                raise UsageError(f"the session {model.session_id} is over; nobody could draw from the sampler")
            sampler_id = f"{model.session_id}:sample:{request.sampling_session_seq_id}"
            self.samplers.keep(sampler_id, model.trained().sampler(), model.session_id)
            entry = SamplerEntry(sampler_id, model.session_id, model.base_model, None, sampler_id)
            # On the event loop, which may end the session at any moment; and before the client learns of it.
            loop.call_soon_threadsafe(self._add_entry, entry)
            return answer(sampling_session_id=sampler_id, path=None, type="save_weights_for_sampler")

        return self._in_order(request.model_id, request.seq_id, work, "other")

    def load_in_place(self, request: asked.LoadWeights) -> Promise:
        """Let a model take over saved weights and, with `optimizer`, where their training stood."""

        def work(model: Model) -> Answer:
            saved = self._loadable(request.path)
            old, model.trainer = model.trained(), self._loaded(saved, optimizer=request.optimizer)
            old.close()
            run = self.store.run(model.model_id)
            model.lora_rank = saved.lora_rank
            if run is not None:
                self.store.begin(replace(run, lora_rank=model.lora_rank))
            return answer(path=request.path, model_id=model.model_id, type="load_weights")

        return self._in_order(request.model_id or "", request.seq_id, work)

    # Sampling

    def open_sampler(self, request: asked.CreateSamplingSession) -> SamplerEntry:
        """Draw from saved weights, or from the base."""
        session = self.heard(request.session_id)
        sampler_id = f"{session.session_id}:sample:{request.sampling_session_seq_id}"
        if sampler_id not in self.entries:
            self._add_entry(self._entry(sampler_id, session.session_id, request.base_model, request.model_path))
        return self.entries[sampler_id]

    def entry(self, sampler_id: str) -> SamplerEntry:
        """The sampler of this id.

        Raises:
            Missing: There is none.
        """
        found, session = self.entries.get(sampler_id), self.sessions.get(sampler_id.partition(":")[0])
        if session is not None and session.had(sampler_id):
            found = found or SamplerEntry(sampler_id, session.session_id, self.served.name, None, GONE)
            session.use(sampler_id)
        if found is None:
            raise Missing(
                f"there is no sampler {sampler_id}: its session is over, or this server was started after it; "
                "create a sampling client from a saved checkpoint"
            )
        return found

    def sample(self, request: asked.Sample, idempotency_key: str | None) -> Promise:
        """Draw.

        Raises:
            Busy: Too many samples wait already.
            Missing: There is no such sampler.
            UsageError: The request has no number, by which it could be told from the others of its sampler.
        """
        if request.sampling_session_id is not None:
            _checked_number(request.seq_id, "seq_id", least=0)
            entry = self.entry(request.sampling_session_id)
            key: Hashable = (entry.sampler_id, request.seq_id)
        else:
            entry = self._entry("", "", request.base_model, request.model_path)
            key = ("asample", idempotency_key or uuid.uuid4().hex)
        if key not in self.promises.by_key:
            if self.schedule.waiting_samples >= self.limits.waiting_samples:
                raise Busy(f"{self.limits.waiting_samples} samples wait already; try again in a second")
            if self.promises.waiting_bytes >= self.limits.waiting_mb * 1_000_000:
                raise Busy(f"{self.limits.waiting_mb} MB of prompts and tables wait already; try again in a second")
        promise, new = self.promises.of(key, entry.session_id)
        if new:
            try:
                draw = read_draw(
                    request, promise, context_tokens=self.served.engine.context_tokens,
                    vocabulary=self.served.vocabulary, most_samples=self.limits.samples,
                    most_tokens=self.limits.sample_tokens,
                )  # fmt: skip
            except TercetError as error:
                promise.keep(failure(str(error)))
            else:
                self.promises.wait(promise, draw.bytes)
                self.schedule.draw(entry.weights, lambda: self._sampler(entry), draw)
        return promise

    async def retrieve(self, request_id: str) -> Answer:
        """The answer of a promise; "try again" when it is not there after half a minute.

        Raises:
            Gone: The promise is not known, or not any more.
        """
        promise = self.promises.get(request_id)
        if promise is not None and not promise.done.is_set():
            try:
                await asyncio.wait_for(promise.done.wait(), LONG_POLL_S)
            except TimeoutError:
                return answer(type="try_again", request_id=request_id, queue_state="active")
        if promise is None or promise.answer is None:
            raise Gone(f"the request {request_id} is not known here, or its answer was kept long enough")
        promise.fetched()
        return promise.answer

    def cancel(self, request_id: str) -> None:
        """Do not draw what nobody waits for; what has begun goes on."""
        for promise in self.schedule.drop(lambda promise: promise.request_id == request_id):
            self.promises.forget(promise)

    # Within

    def _create(
        self, session_id: str, model_seq_id: int | None, base_model: str | None, work: Callable[[Model], Answer]
    ) -> Promise:
        """Make a model, if its name is right and there is room."""
        session = self.heard(session_id)
        model_id = f"{session_id}:train:{_checked_number(model_seq_id, 'model_seq_id', least=0)}"
        promise, new = self.promises.of((model_id, 0), session_id, model_id)
        if not new:
            return promise
        model, loop = Model(model_id, session_id, base_model or ""), asyncio.get_running_loop()

        def made() -> Answer:
            try:
                return work(model)
            except Exception:
                _close(model)
                # On the event loop, and before the client learns of it: what was not made takes no room.
                loop.call_soon_threadsafe(self._not_made, model)
                raise

        if model_id in self.models:
            promise.keep(failure(f"{model_id} is there already; give another model_seq_id"))
        elif len(self.models) >= self.limits.models:
            promise.keep(
                failure(
                    f"{self.limits.models} models are in training already; finish a session, or raise --limits.models"
                )
            )
        elif base_model and base_model not in self.served.names:
            promise.keep(failure(_said(lambda: self.served.checked(base_model))))
        else:
            self.models[model_id] = model
            session.models.append(model_id)
            self.schedule.submit(promise, made)
        return promise

    def _not_made(self, model: Model) -> None:
        self.models.pop(model.model_id, None)
        session = self.sessions.get(model.session_id)
        if session is not None:
            session.models.remove(model.model_id)
        for promise in model.let_go():
            promise.keep(failure(f"{model.model_id} could not be made"))

    def _loaded(self, saved: Checkpoint, *, optimizer: bool) -> Trainer:
        trainer = self.served.engine.trainer(init=Weights(saved.directory))
        if optimizer:
            try:
                trainer.load(Weights(saved.directory)).result()
            except Exception:
                trainer.close()
                raise
        return trainer

    def _begin_run(self, model: Model, user_metadata: dict[str, Any] | None) -> None:
        began, served = now(), self.served.weights
        self.store.begin(Run(model.model_id, model.base_model, served, model.lora_rank, user_metadata, began, began))

    def _in_order(
        self, model_id: str, seq_id: int | None, work: Callable[[Model], Answer], kind: Kind = "learns"
    ) -> Promise:
        model = self.model(model_id)
        number = _checked_number(seq_id, "seq_id", least=1)
        promise, new = self.promises.of((model_id, number), model.session_id, model_id)
        if new:
            do = partial(self.schedule.submit, promise, lambda: work(model), model_id=model_id, kind=kind)
            model.in_order(number, promise, do)
        return promise

    def _loadable(self, path: str) -> Checkpoint:
        saved = self.store.checkpoint(path)
        served = self.served.weights
        if saved.run.served not in (served, self.served.name):
            raise CheckpointError(f"{path} was trained on {saved.run.served}, and this server serves {served}")
        return saved

    def _entry(self, sampler_id: str, session_id: str, base_model: str | None, path: str | None) -> SamplerEntry:
        if path is not None:
            saved = self._loadable(path)
            # With its time: a checkpoint may be overwritten under the same name.
            return SamplerEntry(sampler_id, session_id, saved.run.base_model, path, (path, saved.time))
        if base_model is None:
            raise UsageError("neither base_model nor model_path is given; one of them says what to sample from")
        return SamplerEntry(sampler_id, session_id, self.served.checked(base_model), None, BASE)

    def _add_entry(self, entry: SamplerEntry) -> None:
        self.entries[entry.sampler_id] = entry
        session = self.sessions.get(entry.session_id)
        if session is None or session.finished is not None:
            self._drop_entry(entry.sampler_id)
        else:
            for unused in session.add(entry.sampler_id):
                self._drop_entry(unused)

    def _drop_entry(self, sampler_id: str) -> None:
        entry = self.entries.pop(sampler_id, None)
        if entry is not None and entry.model_path is None and entry.weights != BASE:
            self.samplers.drop(entry.weights)

    def _sampler(self, entry: SamplerEntry) -> Sampler:
        def make() -> Sampler:
            if entry.weights == BASE:
                return self.served.engine.sampler()
            if entry.weights == GONE:
                raise UsageError(
                    f"the sampler {entry.sampler_id} has made room for newer ones of its session; create another "
                    "sampling client of weights that were saved with a name"
                )
            if entry.model_path is None:
                raise UsageError(
                    f"the sampler {entry.sampler_id} was never saved and has made room for newer ones; save it with a "
                    "name, or start the server with a larger --limits.samplers"
                )
            saved = self._loadable(entry.model_path)
            # What is asked for by its name alone is whatever has it now; a client's sampler is what it was.
            if (saved.path, saved.time) != entry.weights:
                raise UsageError(
                    f"{saved.path} was saved anew after the sampler {entry.sampler_id} of it was made, and the old "
                    "weights are gone; create another sampling client to draw from the new ones"
                )
            return self.served.engine.sampler(Weights(saved.directory))

        return self.samplers.get(entry.weights, make)

    def _let_go(self, model: Model) -> Answer:
        _close(model)
        if model.asked_at:
            self.store.touch(model.model_id, model.asked_at)
        return answer()

    async def _tidy_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            try:
                self.tidy()
            except Exception:
                LOG.exception("not everything could be tidied; it is tried again in %g s", TIDY_EVERY_S)

    def _is_over(self, session_id: str, at: float) -> bool:
        session = self.sessions.get(session_id)
        return bool(session_id) and (session is None or at - session.finished_at > GRACE_S)

    def tidy(self) -> None:
        """Let go of what nobody will ask for."""
        at = time.monotonic()
        self.promises.tidy(lambda session_id: self._is_over(session_id, at))
        self.backlog.tidy()
        silent = {each.session_id for each in self.sessions.values() if at - each.heard_at > SILENT_S}
        for promise in self.schedule.drop(lambda promise: promise.session_id in silent):
            self.promises.forget(promise)
        for session in list(self.sessions.values()):
            if session.finished is None and at - session.heard_at > self.limits.session_timeout_s:
                self.finish(session.session_id, "interrupted")
            if session.finished is not None and at - session.heard_at > 2 * self.limits.session_timeout_s:
                del self.sessions[session.session_id]
        for model in list(self.models.values()):
            model.give_up_on_lost()
        self.store.tidy()


BASE: Hashable = "base"
# What a client holds that used many others since.
GONE: Hashable = "gone"


def _checked_number(number: int | None, name: str, *, least: int) -> int:
    if number is None or number < least:
        raise UsageError(f"{name} is {number}; every request has a number of its own, counted from {least}")
    return number


def _close(model: Model) -> Answer:
    if model.trainer is not None:
        model.trainer.close()
        model.trainer = None
    return answer()


def _said(check: Callable[[], object]) -> str:
    try:
        check()
    except TercetError as error:
        return str(error)
    return ""
