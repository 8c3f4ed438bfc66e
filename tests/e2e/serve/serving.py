"""A server in a process of its own, SDK clients of it, and small data; what the tests of serving share."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import CommandLine, Started

tinker: Any = pytest.importorskip("tinker")
types = tinker.types

ROWS = [([40, 41, 42, 43, 44], [0.0, 1.0, 1.0, 0.5]), ([50, 51, 52], [1.0, 1.0])]
ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
ALIAS = "Qwen/Qwen3-8B-Base"
KEPT: list[Any] = []


def kept(client: Any) -> Any:
    """The SDK leaves sockets open, of which Python warns when a client is thrown away: none is, while tests run."""
    KEPT.append(client)
    return client


@dataclass
class Server:
    """A running server."""

    started: Started
    url: str
    token: str

    def client(self) -> Any:
        return kept(tinker.ServiceClient(base_url=self.url, api_key=self.token))

    def rest(self) -> Any:
        return kept(tinker.RestClient(base_url=self.url, api_key=self.token))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """A plain HTTP request."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        payload = body if isinstance(body, bytes | None) else json.dumps(body)
        given = {"X-API-Key": self.token, "Content-Type": "application/json", **headers}
        connection.request(method, path, payload, given)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json else content

    def stop(self) -> None:
        os.kill(self.started.pid, signal.SIGTERM)
        self.started.wait()


def start(tercet: CommandLine, out: Path, *words: object, token: str = "") -> Server:
    """A server of `tiny`; the token is given to it in the environment."""
    serve = ("serve", "--model", "tiny", "--threads", 1, "--port", 0, "--out", out, *words)
    started = tercet.start(*serve, environment={"TINKER_API_KEY": token})
    found = None
    while found is None:
        assert started.is_running(), started.wait().err
        time.sleep(0.02)
        said = started.out.read_text() if started.out.exists() else ""
        found = re.search(r"TINKER_BASE_URL=(\S+) .*\n", said)
    assert not token or token not in said
    return Server(started, found[1], token or "tml-local")


def datum(tokens: list[int], **inputs: list[float]) -> Any:
    """What predicts tokens[1:] from tokens[:-1]."""
    given = {
        name: types.TensorData(data=values, dtype="float32", shape=[len(values)]) for name, values in inputs.items()
    }
    targets = types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets, **given}
    )


def data() -> list[Any]:
    return [datum(tokens, weights=weights) for tokens, weights in ROWS]


def logprobs_of(result: Any) -> list[list[float]]:
    return [list(each["logprobs"].data) for each in result.loss_fn_outputs]


def new_model(client: Any, **settings: Any) -> Any:
    return client.create_lora_training_client(base_model="tiny", rank=8, seed=3, **settings).result()


def learned(client: Any, steps: int = 2) -> Any:
    model = new_model(client)
    for _ in range(steps):
        model.forward_backward(data(), "cross_entropy")
        model.optim_step(types.AdamParams(**ADAM)).result()
    return model
