"""Errors of the SDK are told in our words; ours, and those of our own code, go through as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tercet.engine.told import told
from tercet.errors import CheckpointError, EngineError

tinker = pytest.importorskip("tinker")


def test_what_the_sdk_raises_says_what_to_do():
    from tinker.lib.retryable_exception import RetryableException

    def refuse() -> None:
        raise tinker.RequestFailedError("the rank is 5000", "request", "user")

    def expire() -> None:
        raise RetryableException("Promise expired")

    def misname() -> None:
        tinker.types.ParsedCheckpointTinkerPath.from_tinker_path("nothing")  # a ValueError from within the SDK

    cases: tuple[tuple[Callable[[], None], str], ...] = (
        (refuse, "^the Tinker service refused: the rank is 5000$"),
        (expire, "Promise expired. If it is away, .* run the same command again"),
        (misname, "Invalid tinker path: nothing. If it is away, .* run the same command again"),
    )
    for cause, wanted in cases:
        with pytest.raises(EngineError, match=wanted), told():
            cause()


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), CheckpointError("ours")])
def test_what_is_not_the_sdks_goes_through(error: Exception):
    with pytest.raises(type(error), match="^ours$"), told():
        raise error
