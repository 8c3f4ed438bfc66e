"""A server without a socket, over the engine that is a table; and who asks it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from torch import Tensor

from tercet.engine.fake import FakeEngine
from tercet.server.app import make_app
from tercet.server.promises import Promise, answer
from tercet.server.served import Limits, Served
from tercet.server.service import Service
from tercet.server.store import Store
from tercet.server.wire import MESSAGES

VOCABULARY = 4


def service_in(folder: Path, logits: Tensor | None = None, **limits: Any) -> Service:
    """A service of a table of four tokens, under the names tiny and other."""
    engine = FakeEngine(vocabulary=VOCABULARY, logits=logits)
    served = Served(engine=engine, name="tiny", names=("tiny", "other"), tokenizer=folder, vocabulary=VOCABULARY)
    return Service(served, Store(folder / "served"), Limits(**limits))


class Client:
    """Asks as the SDK does."""

    def __init__(self, http: httpx.AsyncClient, service: Service) -> None:
        self.http, self.service = http, service

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status and what was said."""
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", **headers}
        response = await self.http.request(method, f"/api/v1/{path}", content=content, headers=given)
        is_json = response.headers.get("content-type") == "application/json"
        return response.status_code, response.json() if is_json else response.content

    async def promised(self, path: str, body: Any, **headers: str) -> str:
        """The id of a request that is taken."""
        status, told = await self.ask("POST", path, body, **headers)
        assert status == 200, told
        return str(told["request_id"])

    async def retrieve(self, request_id: str) -> tuple[int, Any]:
        """What came of it."""
        return await self.ask("POST", "retrieve_future", {"request_id": request_id})

    async def do(self, path: str, body: Any) -> Any:
        """A request, and what came of it."""
        status, found = await self.retrieve(await self.promised(path, body))
        assert status == 200, found
        return found

    async def session(self) -> str:
        """A new session."""
        return str((await self.ask("POST", "create_session", {"sdk_version": "0.38.0"}))[1]["session_id"])

    async def model(self, session_id: str, number: int = 0, rank: int = 8) -> str:
        """A new model."""
        found = await self.do("create_model", creation(session_id, number, rank=rank))
        return str(found["model_id"])

    async def sampler(self, model_id: str, seq_id: int, number: int) -> str:
        """A sampler of the model's weights, in memory."""
        asked = {"model_id": model_id, "seq_id": seq_id, "sampling_session_seq_id": number}
        return str((await self.do("save_weights_for_sampler", asked))["sampling_session_id"])

    async def base_sampler(self, session_id: str) -> str:
        """A sampler of the base."""
        asked = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
        return str((await self.ask("POST", "create_sampling_session", asked))[1]["sampling_session_id"])

    async def logprobs(self, sampler_id: str, seq_id: int, prompt: list[int], **more: Any) -> list[float]:
        """Those of a prompt."""
        found = await self.do("asample", sample(sampler_id, seq_id, prompt, prompt_logprobs=True, **more))
        assert isinstance(found, bytes), found
        message = MESSAGES["SampleResponse"]()
        message.ParseFromString(found)
        return list(np.frombuffer(message.prompt_logprobs, "<f4").tolist())


def creation(session_id: str, number: int = 0, *, rank: int = 8, **more: Any) -> dict[str, Any]:
    """A request for a new model."""
    asked = {"session_id": session_id, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": rank}}
    return {**asked, **more}


def sample(sampler_id: str | None, seq_id: int | None, prompt: list[int], **more: Any) -> dict[str, Any]:
    """A request for one token."""
    asked = {"prompt": {"chunks": [{"tokens": prompt}]}, "sampling_params": {"max_tokens": 1, "seed": 0}, **more}
    given = {"sampling_session_id": sampler_id, "seq_id": seq_id}
    return {**asked, **{name: value for name, value in given.items() if value is not None}}


def step(model_id: str, seq_id: int, learning_rate: float = 0.1) -> dict[str, Any]:
    """A request for a step."""
    return {"model_id": model_id, "seq_id": seq_id, "adam_params": {"learning_rate": learning_rate}}


def learning(model_id: str, seq_id: int, tokens: list[int]) -> bytes:
    """A request to learn tokens[1:] from tokens[:-1]."""
    message = MESSAGES["ForwardBackwardRequest"](model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.asarray(tokens[:-1], "<i4").tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = np.asarray(tokens[1:], "<i8").tobytes(), 2
    targets.shape.append(len(tokens) - 1)
    return bytes(message.SerializeToString())


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[Client]:
    """The application at work."""
    app = make_app(service, token=None, local_only=True)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        yield Client(http, service)


def tell(service: Service, story: Callable[[Client], Awaitable[None]]) -> None:
    """Serve for as long as a story takes."""

    async def told() -> None:
        async with serving(service) as client:
            await asyncio.wait_for(story(client), 60)

    asyncio.run(told())


@contextmanager
def busy(service: Service) -> Iterator[None]:
    """The engine does something else meanwhile; it is free again at the end, or when the test is over."""
    free = threading.Event()

    def wait() -> Any:
        assert free.wait(60)
        return answer()

    service.schedule.submit(Promise("", None, ""), wait)
    try:
        yield
    finally:
        free.set()
