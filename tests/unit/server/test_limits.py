"""How much clients may bring and ask for, and what they are told beyond it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.engine.fake import FakeEngine
from tercet.errors import UsageError
from tercet.server.app import make_app
from tercet.server.guard import JSON_BYTES
from tercet.server.learning import learn
from tercet.server.messages import INT64, MESSAGES
from tercet.server.promises import Promise
from tercet.server.refusals import Busy
from tercet.server.requests import CreateModel, CreateSession, Lora
from tercet.server.served import Limits, Served
from tercet.server.service import Service
from tercet.server.store import Store
from tercet.server.wire import LearnRequest, read_learn_request

PREFIX = "/api/v1/"


def service(folder: Path, **limits: Any) -> Service:
    served = Served(FakeEngine(vocabulary=8), "fake", ("fake",), folder, 8)
    return Service(served, Store(folder), Limits(**limits))


def request(*rows: tuple[list[int], list[int]], model_id: str = "", seq_id: int = 1) -> LearnRequest:
    """A cross-entropy on (inputs, targets)."""
    message = MESSAGES["ForwardBackwardRequest"](model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    for inputs, targets in rows:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(inputs, "<i4").tobytes()
        tensor = datum.loss_fn_inputs["target_tokens"]
        tensor.dense, tensor.dtype = np.asarray(targets, "<i8").tobytes(), INT64
        tensor.shape.append(len(targets))
    return read_learn_request(message.SerializeToString())


def told(promise: Promise) -> Any:
    assert promise.answer is not None
    return json.loads(promise.answer.content)


async def ask(app: Any, path: str, pieces: list[bytes], **headers: str) -> tuple[int, str]:
    """A POST whose body comes in pieces; status and detail. No more pieces are taken than are asked for."""
    coming, sent = iter(pieces), list[Any]()
    given = {"host": "127.0.0.1", "content-type": "application/json", **headers}

    async def receive() -> Any:
        body = next(coming, None)
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1), "headers": [(k.encode(), v.encode()) for k, v in given.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], str(json.loads(content)["detail"])


@pytest.mark.parametrize(
    ("endpoint", "most", "wanted"),
    [
        ("forward_backward", 20_000_000, "larger than 20 MB; send it in pieces, or raise --limits.body-mb"),
        ("asample", JSON_BYTES, "larger than 16 MB; only forward_backward's may be"),
        ("telemetry", JSON_BYTES, "larger than 16 MB; only forward_backward's may be"),
        ("no/such/endpoint", JSON_BYTES, "larger than 16 MB"),
    ],
)
def test_a_large_body_is_refused_by_its_length_and_without_one_as_soon_as_too_much_has_come(
    endpoint, most, wanted, tmp_path
):
    app = make_app(service(tmp_path, body_mb=20), token=None, local_only=True)
    length = {"content-length": str(most + 1)}
    status, detail = asyncio.run(ask(app, PREFIX + endpoint, [], **length))
    assert status == 413 and wanted in detail
    if endpoint in ("forward_backward", "asample"):  # the others never look at what they are sent
        pieces = [b" " * 1_000_000] * (most // 1_000_000)
        exact, _ = asyncio.run(ask(app, PREFIX + endpoint, pieces))
        assert exact != 413
        status, detail = asyncio.run(ask(app, PREFIX + endpoint, [*pieces, b" "]))
        assert status == 413 and wanted in detail


def test_a_small_limit_for_bodies_holds_for_every_endpoint(tmp_path):
    app = make_app(service(tmp_path, body_mb=1), token=None, local_only=True)
    for endpoint in ("forward_backward", "asample"):
        status, detail = asyncio.run(ask(app, PREFIX + endpoint, [b"x" * 600_000] * 2))
        assert (status, detail) == (
            413, "the body is larger than 1 MB; send it in pieces, or raise --limits.body-mb"
        )  # fmt: skip


def test_a_request_of_too_many_tokens_is_refused_and_the_model_goes_on(tmp_path):
    async def ask_all() -> list[Any]:
        server = service(tmp_path, request_tokens=6)
        worker = asyncio.create_task(server.schedule.run())
        session = server.open_session(CreateSession())
        create = CreateModel(session_id=session.session_id, model_seq_id=0, base_model="fake")
        made = server.create_model(create)
        await made.done.wait()
        row = ([1, 2, 3], [2, 3, 4])
        asked = [
            server.learn(request(*[row] * n, model_id=told(made)["model_id"], seq_id=seq_id))
            for seq_id, n in ((1, 3), (2, 2))
        ]
        await asyncio.gather(*(each.done.wait() for each in asked))
        worker.cancel()
        return asked

    large, fitting = asyncio.run(ask_all())
    assert told(large)["error"].startswith("the request has 9 tokens, and 6 are allowed; send it in pieces")
    assert fitting.answer.media_type == "application/x-protobuf"


def test_targets_that_are_not_shifted_are_refused_before_they_take_memory():
    trainer = FakeEngine(vocabulary=8, context_tokens=8).trainer()
    # Of three tokens, targets beside the sequence at places 0 and 1: 3 + 1 + 2 = 6 tokens.
    unshifted = request(([1, 2, 3], [1, 2, 3]))
    assert learn(trainer, unshifted, most_tokens=6)
    with pytest.raises(UsageError) as refused:
        learn(trainer, unshifted, most_tokens=5)
    assert "2 of the request's 3 targets are not the input's next token" in str(refused.value)
    assert "comes to 6 tokens, and 5 are allowed. target_tokens must be the inputs shifted by one" in str(refused.value)
    shifted = request(([1, 2, 3], [2, 3, 4]))
    assert learn(trainer, shifted, most_tokens=3)
    # 100,000 tokens would be 5,000,050,000 with their branches; it is known before the model's context is looked at.
    many = [1, 2] * 50_000
    with pytest.raises(UsageError, match="comes to 5000050000 tokens, and 4000000 are allowed"):
        learn(trainer, request((many, many)), most_tokens=4_000_000)


def test_data_to_learn_from_wait_up_to_a_limit_and_find_room_once_some_are_done(tmp_path):
    async def ask_all() -> None:
        server = service(tmp_path, waiting_mb=1)
        session = server.open_session(CreateSession())
        made = server.create_model(CreateModel(session_id=session.session_id, model_seq_id=0, base_model="fake"))
        worker = asyncio.create_task(server.schedule.run())
        await made.done.wait()
        worker.cancel()
        model_id = told(made)["model_id"]

        def learn(seq_id: int) -> Promise:
            sent = request(([1, 2], [2, 3]), model_id=model_id, seq_id=seq_id)
            return server.learn(LearnRequest(model_id, seq_id, sent.loss, sent.forward_only, sent.message, 600_000))

        first, second = learn(1), learn(2)
        with pytest.raises(Busy, match="1 MB to learn from wait already; try again in a second"):
            learn(3)
        assert learn(2) is second and server.backlog.bytes == 1_200_000  # sent again, it waits already
        worker = asyncio.create_task(server.schedule.run())
        await asyncio.gather(first.done.wait(), second.done.wait())
        assert server.backlog.bytes == 0
        fifth, fourth = learn(5), learn(4)
        with pytest.raises(Busy):
            learn(6)
        third = learn(3)  # what the others wait for is let in, or none would ever be done
        await asyncio.gather(*(each.done.wait() for each in (third, fourth, fifth)))
        assert server.backlog.bytes == 0
        worker.cancel()
        learn(7)
        learn(8)  # they wait for 6, which does not come
        server.finish(session.session_id, "success")
        assert server.backlog.bytes == 0

    asyncio.run(ask_all())


def test_what_one_client_lets_wait_leaves_every_other_its_share(tmp_path):
    async def ask_all() -> None:
        server = service(tmp_path, waiting_mb=3, session_timeout_s=1000.0)
        models = []
        worker = asyncio.create_task(server.schedule.run())
        for _ in range(3):
            session = server.open_session(CreateSession())
            made = server.create_model(CreateModel(session_id=session.session_id, model_seq_id=0, base_model="fake"))
            await made.done.wait()
            models.append(told(made)["model_id"])
        worker.cancel()

        def learn(model: str, seq_id: int, size: int = 1_000_000) -> Promise:
            sent = request(([1, 2], [2, 3]), model_id=model, seq_id=seq_id)
            return server.learn(LearnRequest(model, seq_id, sent.loss, sent.forward_only, sent.message, size))

        hog, other, third = models
        for seq_id in (2, 3, 4):
            learn(hog, seq_id)  # request 1 does not come
        with pytest.raises(Busy):
            learn(hog, 5)
        # Of two sessions each has 1.5 MB, of three 1 MB.
        asked = [learn(other, 1), learn(other, 2)]
        with pytest.raises(Busy):
            learn(other, 3)
        asked.append(learn(third, 1))
        with pytest.raises(Busy):
            learn(third, 2)
        worker = asyncio.create_task(server.schedule.run())
        await asyncio.gather(*(each.done.wait() for each in asked))
        assert server.backlog.bytes == 3_000_000
        await asyncio.wait_for(learn(other, 3).done.wait(), 60)
        worker.cancel()

    asyncio.run(ask_all())


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda datum: ("dense", datum.loss_fn_inputs["target_tokens"], 15), "target_tokens of datum 1 has 15 bytes"),
        (lambda datum: ("tokens", datum.model_input[0].encoded_text, 7), "model_input of datum 1 has 7 bytes"),
    ],
)
def test_numbers_that_are_cut_short_are_told_to_be_the_clients_own_mistake(spoil, wanted):
    sent = request(([1, 2], [2, 3]), ([1, 2], [2, 3]))
    name, holder, size = spoil(sent.message.data[1])
    setattr(holder, name, getattr(holder, name)[:size])
    with pytest.raises(UsageError, match=f"{wanted}, which are no whole numbers of [48] each"):
        sent.rows()


def test_a_rank_beyond_all_use_is_refused():
    assert Lora(rank=1024).config().rank == 1024
    with pytest.raises(UsageError, match="the LoRA rank is 1025; here it is from 1 to 1024"):
        Lora(rank=1025).config()
    with pytest.raises(UsageError, match="rank is 0; it must be at least 1"):
        Lora(rank=0).config()
