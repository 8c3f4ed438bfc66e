"""The queue in front of the engine, and what waits in it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from tercet.engine.fake import FakeEngine
from tercet.errors import UsageError
from tercet.server.promises import Promise, Promises, answer
from tercet.server.requests import Sample
from tercet.server.sampling import Draw, read_draw
from tercet.server.schedule import Schedule
from tercet.server.wire import MESSAGES


class CountingSampler:
    """A real sampler that notes how many prompts each call brought."""

    def __init__(self) -> None:
        self.sampler = FakeEngine(vocabulary=4).sampler()
        self.calls: list[int] = []

    def sample(self, prompts: Any, *args: Any, **settings: Any) -> Future[Any]:
        self.calls.append(len(prompts))
        return self.sampler.sample(prompts, *args, **settings)

    def logprobs(self, *args: Any) -> Future[Any]:
        return self.sampler.logprobs(*args)


def draw_of(number: int, **asked: Any) -> Draw:
    prompt = {"chunks": [{"tokens": asked.pop("prompt", [1, 2])}]}
    params = {"max_tokens": 3, "seed": number, **asked.pop("params", {})}
    request = Sample.model_validate({"prompt": prompt, "sampling_params": params, **asked})
    promise = Promise(str(number), number, "session")
    return read_draw(request, promise, context_tokens=64, vocabulary=4, most_samples=8)


def samples(promise: Promise) -> list[bytes]:
    assert promise.answer is not None
    message = MESSAGES["SampleResponse"]()
    message.ParseFromString(promise.answer.content)
    return [sequence.tokens for sequence in message.sequences]


def run(schedule: Schedule, *promises: Promise) -> None:
    async def until_done() -> None:
        worker = asyncio.create_task(schedule.run())
        await asyncio.gather(*(promise.done.wait() for promise in promises))
        worker.cancel()

    asyncio.run(until_done())


def test_requests_that_wait_for_the_same_weights_and_settings_are_one_call():
    sampler, schedule = CountingSampler(), Schedule()
    alike = [draw_of(i) for i in range(1000)]
    other = [draw_of(1000 + i, params={"temperature": 0.5}) for i in range(3)]
    for draw in [*alike, *other]:
        schedule.draw("weights", lambda: sampler, draw)
    assert schedule.waiting_samples == 1003
    run(schedule, *(draw.promise for draw in [*alike, *other]))
    assert sampler.calls == [1000, 3]
    assert schedule.waiting_samples == 0


def test_a_sample_does_not_depend_on_what_it_waited_with():
    sampler, together, alone = CountingSampler(), Schedule(), Schedule()
    draws = [draw_of(i, prompt=[i % 4, 1]) for i in range(5)]
    for draw in draws:
        together.draw("weights", lambda: sampler, draw)
    run(together, *(draw.promise for draw in draws))
    lone = draw_of(3, prompt=[3, 1])
    alone.draw("weights", lambda: sampler, lone)
    run(alone, lone.promise)
    assert samples(lone.promise) == samples(draws[3].promise)


def test_jobs_are_done_in_order_and_one_that_fails_says_why_and_stops_no_other():
    schedule, order = Schedule(), []
    promises = [Promise(str(i), i, "session") for i in range(4)]

    def work(i: int) -> Any:
        order.append(i)
        if i == 1:
            raise UsageError("not like this")
        if i == 2:
            raise ZeroDivisionError
        return answer(done=i)

    for i, promise in enumerate(promises):
        schedule.submit(promise, lambda i=i: work(i))
    run(schedule, *promises)
    assert order == [0, 1, 2, 3]
    told = [promise.answer.content.decode() for promise in promises if promise.answer]
    assert told[0] == '{"done": 0}' and told[3] == '{"done": 3}'
    assert told[1] == '{"error": "not like this", "category": "user"}'
    assert "ZeroDivisionError" in told[2] and '"category": "server"' in told[2]


def test_samples_nobody_wants_any_more_are_not_drawn():
    sampler, schedule = CountingSampler(), Schedule()
    kept, dropped = draw_of(1), draw_of(2)
    for draw in (kept, dropped):
        schedule.draw("weights", lambda: sampler, draw)
    assert schedule.drop(lambda promise: promise.request_id == "2") == [dropped.promise]
    run(schedule, kept.promise)
    assert sampler.calls == [1]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": []}, "the prompt has 0 tokens; it must have from 1 to 63"),
        ({"prompt": [4]}, "the prompt has the token 4; the model knows 0 to 3"),
        ({"num_samples": 9}, "num_samples is 9; it must be from 1 to 8"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k is not offered"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n is 2; it must be from 1 to 1"),
        ({"params": {"temperature": -1}}, "temperature is -1.0; it must be 0 or above"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_in_words(asked, told):
    with pytest.raises(UsageError, match=told):
        draw_of(1, **asked)


def test_a_request_sent_again_meets_its_promise_until_that_is_forgotten():
    promises = Promises(kept_s=0.0, kept_unfetched_s=1000.0)
    first, new = promises.of(("model", 1), "session")
    again, newer = promises.of(("model", 1), "session")
    assert (first is again, new, newer) == (True, True, False)
    promises.tidy()  # what is not answered stays
    assert promises.get(first.request_id) is first
    first.keep(answer(a=1))
    first.keep(answer(a=2))
    assert first.answer is not None and first.answer.content == b'{"a": 1}'
    promises.tidy()
    assert promises.get(first.request_id) is first  # nobody has fetched it
    first.fetched_at = 0.0
    promises.tidy()
    assert promises.get(first.request_id) is None
    assert promises.of(("model", 1), "session")[1]
