"""What a Tinker service, its SDK or the way between them has against a request, as an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tercet.errors import EngineError

AGAIN = (
    "If it is away, or was started anew and has lost this session: once it answers, run the same command again, and a "
    "run goes on from its last checkpoint"
)


@contextmanager
def told() -> Iterator[None]:
    """Let the SDK's errors out as an EngineError that says what to do; ours, and those of our own code, as they are.

    Raises:
        EngineError: See above.
    """
    import tinker
    from tinker.lib.retryable_exception import RetryableException

    try:
        yield
    except (tinker.RequestFailedError, tinker.BadRequestError, tinker.UnprocessableEntityError) as error:
        raise EngineError(f"the Tinker service refused: {error}") from error
    except (tinker.AuthenticationError, tinker.PermissionDeniedError) as error:
        raise EngineError(f"the Tinker service let nobody in: {error}; TINKER_API_KEY is the key") from error
    except (tinker.TinkerError, RetryableException) as error:
        raise EngineError(f"the Tinker service did not do what it was asked: {_said(error)}. {AGAIN}") from error
    except (ValueError, RuntimeError, TimeoutError) as error:
        # An answer that could not be fetched, and a client that sends no more after one: the SDK has no class for them.
        if not _is_the_sdks(error):
            raise
        raise EngineError(f"the Tinker service did not do what it was asked: {_said(error)}. {AGAIN}") from error


def _said(error: Exception) -> str:
    said = str(error).rstrip(".")
    return f"{said} ({error.__cause__})" if error.__cause__ else said


def _is_the_sdks(error: BaseException) -> bool:
    """Whether the SDK itself raised it: what it calls of ours may fail too, and is ours to mend."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).split(".")[0] == "tinker"
