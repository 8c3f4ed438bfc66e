"""A session on the tiny model, and what it said, shared by the tests of a file."""

import pytest

from tercet.recipes.session import Session, SetupConfig, open_session


@pytest.fixture(scope="module")
def heard() -> list[str]:
    return []


@pytest.fixture(scope="module")
def session(heard: list[str]) -> Session:
    return open_session(SetupConfig(model="tiny", threads=1), heard.append)
