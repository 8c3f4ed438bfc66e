"""One server, one client and the local engine, for all tests of a module."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tercet.engine.local import LocalEngine
from tercet.models.load import load_model
from tests.e2e.commands import CommandLine


@pytest.fixture(autouse=True)
def _thrown_away_at_once() -> Iterator[None]:
    yield
    gc.collect()  # here, where warnings are off, and not in the middle of another test


@pytest.fixture(scope="module")
def server(tercet: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.e2e.serve.serving import ALIAS, start  # the SDK may be absent

    running = start(tercet, tmp_path_factory.mktemp("served"), "--alias", f"{ALIAS}=tiny")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Any]:
    client = server.client()
    yield client
    client.close("success")


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(load_model("tiny"))
