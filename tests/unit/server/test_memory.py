"""What a server holds: nothing of clients that are gone, and no more of one that stays the longer it stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tercet.engine.fake import FakeEngine
from tercet.server import sessions as at_sessions
from tercet.server.promises import GRACE_S
from tercet.server.service import KEPT_S, KEPT_UNFETCHED_S, Service
from tests.unit.server.asking import Client, busy, creation, learning, sample, service_in, step, tell


def held(service: Service) -> dict[str, int]:
    """How much there is in every table of the service and its parts that is not empty, and what they count."""

    def tables(value: Any) -> Iterator[int]:
        if isinstance(value, tuple):
            for each in value:
                yield from tables(each)
        elif isinstance(value, int) or (hasattr(value, "__len__") and not isinstance(value, str)):
            yield value if isinstance(value, int) else len(value)

    parts = {
        "": service, "promises.": service.promises, "schedule.": service.schedule, "samplers.": service.samplers,
        "backlog.": service.backlog,
    }  # fmt: skip
    settings = {"kept_s", "kept_unfetched_s", "most_bytes", "most", "calls", "drawn"}
    found = {
        prefix + name: sum(tables(value))
        for prefix, part in parts.items()
        for name, value in vars(part).items()
        if name not in settings
    }
    return {name: size for name, size in found.items() if size}


def move_on(service: Service, seconds: float) -> None:
    """Let time pass; whoever is not heard of in it was silent."""
    for session in service.sessions.values():
        session.heard_at, session.finished_at = session.heard_at - seconds, session.finished_at - seconds
    for promise in service.promises.by_id.values():
        promise.made_at, promise.answered_at = promise.made_at - seconds, promise.answered_at - seconds
        if promise.fetched_at is not None:
            promise.fetched_at -= seconds
    service.tidy()


async def live(client: Client) -> str:
    """A session in which everything is asked for that leaves something; its id."""
    session = await client.session()
    failing = await client.promised("create_model", creation(session, 9, optimizer_config={"type": "dimuon"}))
    await client.retrieve(failing)
    model = await client.model(session)
    await client.do("forward_backward", learning(model, 1, [0, 1]))
    await client.do("optim_step", step(model, 2))
    path = (await client.do("save_weights", {"model_id": model, "seq_id": 3, "path": "a"}))["path"]
    named = {"session_id": session, "sampling_session_seq_id": 1, "model_path": path}
    assert (await client.ask("POST", "create_sampling_session", named))[0] == 200
    samplers = [await client.sampler(model, 4, 2), f"{session}:sample:1", await client.base_sampler(session)]
    for sampler in samplers:
        assert isinstance(await client.do("asample", sample(sampler, 0, [0])), bytes)
        assert "error" in await client.do("asample", sample(sampler, 1, [9]))  # no such token
        await client.promised("asample", sample(sampler, 2, [0]))  # nobody fetches it
    assert isinstance(await client.do("asample", sample(None, None, [0], base_model="tiny")), bytes)
    with busy(client.service):
        cancelled = await client.promised("asample", sample(samplers[0], 3, [0]))
        assert (await client.ask("POST", "cancel_future", {"request_id": cancelled}))[0] == 204
        await client.promised("asample", sample(samplers[0], 4, [0]))
        await client.promised("forward_backward", learning(model, 5, [0, 1]))
        await client.promised("forward_backward", learning(model, 7, [0, 1]))  # 6 never comes
        unfinished = await client.promised("save_weights", {"model_id": model, "seq_id": 6, "path": "b"})
    await client.retrieve(unfinished)
    return session


def test_nothing_is_left_of_clients_that_have_gone(tmp_path: Path):
    async def story(client: Client) -> None:
        service = client.service
        finished, silent = await live(client), await live(client)
        assert len(held(service)) >= 8 and held(service)["promises.by_id"] > 20
        assert (await client.ask("POST", f"sessions/{finished}/finish", {}))[0] == 204
        drained = await client.session()  # what was submitted before it is done when its model is made
        await client.model(drained)
        assert (await client.ask("POST", f"sessions/{drained}/finish", {}))[0] == 204
        move_on(service, GRACE_S + 1)
        assert {promise.session_id for promise in service.promises.by_id.values()} == {silent, ""}
        assert set(service.models) == {f"{silent}:train:0"}
        move_on(service, 1000.0)  # beyond the time that a session may be silent
        assert (service.entries, service.models, len(service.samplers)) == ({}, {}, 3)  # what can be read again stays
        await client.model(await client.session())  # after it, the engine has let go of the others
        move_on(service, KEPT_UNFETCHED_S + 1)
        while held(service).get("schedule.jobs"):
            await asyncio.sleep(0.01)
        move_on(service, KEPT_UNFETCHED_S + 1)
        for weights in list(service.samplers._kept):
            service.samplers.drop(weights)
        assert held(service) == {}

    tell(service_in(tmp_path, session_timeout_s=500.0), story)


def test_a_client_that_stays_holds_no_more_for_every_request(tmp_path: Path):
    async def story(client: Client) -> None:
        session, service = await client.session(), client.service
        model = await client.model(session)
        sampler = await client.sampler(model, 1, 0)

        async def turn(number: int) -> dict[str, int]:
            # Forty requests to sample, and a step, in whatever time the answers to those before it are kept.
            for seq_id in range(number * 40, number * 40 + 40):
                assert isinstance(await client.do("asample", sample(sampler, seq_id, [0])), bytes)
            for seq_id in (2 * number + 2, 2 * number + 3):
                await client.do("optim_step", step(model, seq_id))
            move_on(service, KEPT_S + 1)
            service.sessions[session].heard_at += KEPT_S + 1
            found = held(service)
            assert found.pop("promises.bytes") < 40 * 1600
            return found

        first = await turn(0)
        assert first["promises.by_id"] == 1  # the last step's: it may have been lost on its way
        assert [await turn(number) for number in range(1, 4)] == [first] * 3

    tell(service_in(tmp_path), story)


def test_of_very_many_samplers_those_unused_longest_are_forgotten_and_whoever_asks_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(at_sessions, "HELD_SAMPLERS", 4)

    async def story(client: Client) -> None:
        session, service = await client.session(), client.service
        base, model = await client.base_sampler(session), await client.model(session)
        for number in range(1, 9):
            await client.sampler(model, number, number)
            assert isinstance(await client.do("asample", sample(base, number, [0])), bytes)
            assert len(service.entries) == len(service.sessions[session].samplers) == min(4, number + 1)
            assert len(service.samplers) <= 3
        told = (await client.ask("GET", f"sessions/{session}"))[1]["sampler_ids"]
        assert told == [f"{session}:sample:{number}" for number in (6, 7, 8, 0)]
        for number, said in (
            (6, "was never saved and has made room for newer ones; save it with a name"),  # still known, not in memory
            (2, "has made room for newer ones of its session; create another sampling client of weights that"),
        ):
            failed = await client.do("asample", sample(f"{session}:sample:{number}", 0, [0]))
            assert said in failed["error"] and failed["category"] == "user"
        status, told = await client.ask("GET", f"samplers/{session}:sample:2")
        assert (status, told["base_model"]) == (200, "tiny")
        for never in (f"{session}:sample:9", f"{session}:sample:x", "nobody:sample:0"):
            assert (await client.ask("POST", "asample", sample(never, 0, [0])))[0] == 404
        assert json.dumps(held(service)).count("entries") == 1

    tell(service_in(tmp_path, samplers=3), story)


@pytest.mark.parametrize(
    ("fit", "prompt", "more"),
    [
        (28, [0] * 1000, {}),  # 36 bytes a token: 36,000
        (4, [0], {"topk_sample_logprobs": 4, "num_samples": 8, "sampling_params": {"max_tokens": 1000}}),  # 8 an entry
        (4, [0] * 1000, {"topk_prompt_logprobs": 30}),
    ],
    ids=["prompts", "tables of samples", "tables of prompts"],
)
def test_what_waits_to_be_sampled_from_is_bounded_by_what_it_takes(tmp_path: Path, fit: int, prompt: Any, more: Any):
    async def story(client: Client) -> None:
        sampler = await client.base_sampler(await client.session())
        with busy(client.service):
            taken = [await client.promised("asample", sample(sampler, k, prompt, **more)) for k in range(fit)]
            status, told = await client.ask("POST", "asample", sample(sampler, fit, prompt, **more))
            assert (status, told["detail"]) == (429, "1 MB of prompts and tables wait already; try again in a second")
            assert await client.promised("asample", sample(sampler, 0, prompt, **more)) == taken[0]
            await client.ask("POST", "cancel_future", {"request_id": taken[0]})
            taken.append(await client.promised("asample", sample(sampler, fit, prompt, **more)))
            for each in taken[1:-1]:
                await client.ask("POST", "cancel_future", {"request_id": each})
        assert isinstance((await client.retrieve(taken[-1]))[1], bytes)
        assert client.service.promises.waiting_bytes == 0

    service = service_in(tmp_path, waiting_mb=1)
    service.served = replace(service.served, engine=FakeEngine(vocabulary=4, context_tokens=1024))
    tell(service, story)
