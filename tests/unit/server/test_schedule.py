"""The queue in front of the engine, and what waits in it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from tercet.engine.fake import FakeEngine
from tercet.errors import UsageError
from tercet.server.promises import Promise, Promises, answer
from tercet.server.requests import Sample
from tercet.server.sampling import Draw, read_draw
from tercet.server.schedule import Schedule
from tercet.server.served import Limits
from tercet.server.wire import MESSAGES


class CountingSampler:
    """A real sampler that notes how many prompts each call brought."""

    def __init__(self) -> None:
        self.sampler = FakeEngine(vocabulary=4).sampler()
        self.calls: list[int] = []
        self.tables: list[tuple[int, int, float]] = []

    def sample(self, prompts: Any, *args: Any, **settings: Any) -> Future[Any]:
        self.calls.append(len(prompts))
        return self.sampler.sample(prompts, *args, **settings)

    def logprobs(self, *args: Any) -> Future[Any]:
        return self.sampler.logprobs(*args)

    def top_logprobs(self, sequences: Any, k: int, starts: Any, temperature: float) -> Future[Any]:
        self.tables.append((len(sequences), k, temperature))
        return self.sampler.top_logprobs(sequences, k, starts, temperature)


def draw_of(number: int, **asked: Any) -> Draw:
    prompt = {"chunks": [{"tokens": asked.pop("prompt", [1, 2])}]}
    params = {"max_tokens": 3, "seed": number, **asked.pop("params", {})}
    request = Sample.model_validate({"prompt": prompt, "sampling_params": params, **asked})
    promise = Promise(str(number), number, "session")
    return read_draw(request, promise, context_tokens=64, vocabulary=4, most_samples=8, most_tokens=100)


def answered(promise: Promise) -> Any:
    assert promise.answer is not None
    message = MESSAGES["SampleResponse"]()
    message.ParseFromString(promise.answer.content)
    return message


def samples(promise: Promise) -> list[bytes]:
    return [sequence.tokens for sequence in answered(promise).sequences]


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


def test_tables_of_the_likeliest_tokens_are_one_call_for_all_who_ask_for_as_many():
    sampler, schedule = CountingSampler(), Schedule()
    params = {"params": {"temperature": 0.5, "max_tokens": 2}, "num_samples": 2}
    beside = [draw_of(i, topk_sample_logprobs=2, **params) for i in range(20)]
    prompts = [draw_of(20 + i, prompt=[1, 2, 3], topk_prompt_logprobs=3, **params) for i in range(10)]
    other = [draw_of(30 + i, topk_sample_logprobs=3, **params) for i in range(5)]
    for draw in [*beside, *prompts, *other]:
        schedule.draw("weights", lambda: sampler, draw)
    run(schedule, *(draw.promise for draw in [*beside, *prompts, *other]))
    assert sampler.calls == [35]
    assert sorted(sampler.tables) == [(10, 3, 0.5), (10, 3, 1.0), (40, 2, 0.5)]
    for draw in [beside[7], prompts[3], other[2]]:
        alone, lone = Schedule(), Promise("", None, "session")
        alone.draw("weights", CountingSampler, replace(draw, promise=lone))
        run(alone, lone)
        assert lone.answer == draw.promise.answer
    sequences = answered(beside[7].promise).sequences
    assert [(each.topk_sampled_logprobs.k, each.topk_sampled_logprobs.length) for each in sequences] == [(2, 2)] * 2
    prompt = answered(prompts[3].promise).topk_prompt_logprobs
    assert (prompt.k, prompt.length) == (3, 3)
    assert not answered(prompts[3].promise).sequences[0].HasField("topk_sampled_logprobs")
    assert not answered(other[2].promise).HasField("topk_prompt_logprobs")


def test_large_tables_are_made_in_several_calls(monkeypatch):
    monkeypatch.setattr("tercet.server.sampling.TOP_ENTRIES", 12)
    sampler, schedule = CountingSampler(), Schedule()
    # Each asks for 2 tokens at each of 3 places, the last at each of 7.
    draws = [draw_of(i, topk_sample_logprobs=2) for i in range(5)]
    draws.append(draw_of(5, topk_sample_logprobs=2, params={"max_tokens": 7}))
    for draw in draws:
        schedule.draw("weights", lambda: sampler, draw)
    run(schedule, *(draw.promise for draw in draws))
    assert sampler.tables == [(2, 2, 1.0), (2, 2, 1.0), (1, 2, 1.0), (1, 2, 1.0)]


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
        # 8 * 12 tokens, and 2 places of the prompt: 96 + 2 * 2 = 100 are allowed.
        ({"num_samples": 8, "params": {"max_tokens": 12}, "topk_prompt_logprobs": 3}, "the request is for 102 tokens"),
        ({"num_samples": 3, "topk_sample_logprobs": 11}, "3 samples of 3, the 11 likeliest beside each.*100 are all"),
        ({"num_samples": 2, "params": {"max_tokens": None}}, "the request is for 124 tokens .2 samples of 62"),
        ({"params": {"temperature": -1}}, "temperature is -1.0; it must be 0 or above"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_in_words(asked, told):
    with pytest.raises(UsageError, match=told):
        draw_of(1, **asked)


def test_a_request_for_as_many_tokens_as_are_allowed_is_read():
    params = {"max_tokens": 12}
    assert draw_of(1, num_samples=8, params=params, topk_prompt_logprobs=2).n == 8
    assert draw_of(1, num_samples=3, topk_sample_logprobs=10).top_of_samples == 10


def test_the_default_limit_lets_in_what_recipes_ask_for():
    for samples, top in ((4, 0), (256, 20), (1024, 8)):
        sent = {"prompt": {"chunks": [{"tokens": [1] * 4096}]}, "sampling_params": {"max_tokens": 1024}}
        asked = Sample.model_validate({**sent, "num_samples": samples, "topk_sample_logprobs": top})
        limits = Limits()
        found = read_draw(
            asked, Promise("", None, ""), context_tokens=32768, vocabulary=4, most_samples=limits.samples,
            most_tokens=limits.sample_tokens,
        )  # fmt: skip
        assert (found.n, found.params.max_tokens) == (samples, 1024)


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
