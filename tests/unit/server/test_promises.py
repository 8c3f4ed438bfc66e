"""What answers and requests take in memory, and which of them make room."""

from __future__ import annotations

import time

import pytest

from tercet.server.promises import PROMISE_BYTES, Answer, Promise, Promises


def table(answers: int) -> Promises:
    """Room for so many answers of 1,000 bytes."""
    return Promises(kept_s=120.0, kept_unfetched_s=3600.0, most_bytes=answers * (PROMISE_BYTES + 1000))


def answered(promises: Promises, name: str, *, model: str = "", session: str = "session", size: int = 1000) -> Promise:
    promise, new = promises.of(name, session, model)
    assert new
    promise.keep(Answer(b"x" * size))
    return promise


def left(promises: Promises) -> set[object]:
    assert {promise.key for promise in promises.by_id.values()} == set(promises.by_key)
    return set(promises.by_key)


def test_beyond_their_room_answers_go_in_the_order_of_who_misses_them_least():
    promises = table(4)
    steps = [answered(promises, name, model="model") for name in ("step 1", "step 2")]
    samples = [answered(promises, name) for name in ("sample 1", "sample 2")]
    assert left(promises) == {"step 1", "step 2", "sample 1", "sample 2"}
    samples[1].fetched()
    steps[1].fetched()
    answered(promises, "sample 3")  # the sample that was fetched
    assert left(promises) == {"step 1", "step 2", "sample 1", "sample 3"}
    answered(promises, "sample 4")  # a sample can be drawn again; a step is done once, and its reply may be lost
    assert left(promises) == {"step 1", "step 2", "sample 3", "sample 4"}
    for name in ("step 3", "step 4"):
        answered(promises, name, model="model")
    assert left(promises) == {"step 1", "step 2", "step 3", "step 4"}
    answered(promises, "step 5", model="model")
    assert left(promises) == {"step 2", "step 3", "step 4", "step 5"}


def test_the_newest_answer_stays_however_large_it_is():
    promises = table(2)
    answered(promises, "small")
    large = answered(promises, "large", size=100_000)
    assert left(promises) == {"large"}
    assert promises.bytes == PROMISE_BYTES + 100_000
    answered(promises, "next")
    assert left(promises) == {"next"}
    large.fetched()  # by whoever waited for it: it is gone already, and counts for nothing
    assert promises.bytes == PROMISE_BYTES + 1000


def test_many_small_answers_are_bounded_too():
    promises = table(10)
    for number in range(1000):
        answered(promises, f"{number}", size=0)
    assert len(promises.by_id) == 10 * (PROMISE_BYTES + 1000) // PROMISE_BYTES
    assert promises.bytes <= promises.most_bytes


def test_the_answers_of_a_session_that_is_over_go_with_it():
    promises = table(4)
    answered(promises, "here", session="here", model="model")
    answered(promises, "over", session="over", model="other")
    waiting, _ = promises.of("later", "over")
    promises.tidy(lambda session: session == "over")
    assert left(promises) == {"here", "later"}  # the engine may be at it; its answer goes when it is there
    waiting.keep(Answer(b""))
    promises.tidy(lambda session: session == "over")
    assert left(promises) == {"here"}


@pytest.mark.parametrize("done", ["kept", "forgotten"])
def test_what_requests_take_is_counted_until_they_are_answered_or_forgotten(done):
    promises = table(4)
    first, second = [promises.of(name, "session")[0] for name in "ab"]
    promises.wait(first, 300)
    promises.wait(second, 500)
    assert promises.waiting_bytes == 800
    for promise in (first, first):
        promise.keep(Answer(b"")) if done == "kept" else promises.forget(promise)
    assert promises.waiting_bytes == 500
    promises.forget(second)
    second.keep(Answer(b"x" * 1000))  # the engine was at it
    assert (promises.waiting_bytes, promises.bytes) == (0, PROMISE_BYTES if done == "kept" else 0)


def test_an_answer_about_a_model_is_kept_for_an_hour_at_most():
    promises = table(4)
    step, sample = answered(promises, "step", model="model"), answered(promises, "sample")
    for promise in (step, sample):
        promise.fetched()
        promise.made_at, promise.fetched_at = (time.monotonic() - age for age in (122, 121))
    promises.tidy()
    assert left(promises) == {"step"}
    step.answered_at -= 3601
    promises.tidy()
    assert left(promises) == set() and promises.bytes == 0
