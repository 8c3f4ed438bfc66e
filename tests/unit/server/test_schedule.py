"""The queue in front of the engine, and what waits in it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tercet.engine.budgets import Budgets
from tercet.engine.fake import FakeEngine
from tercet.errors import UsageError
from tercet.server.promises import Promise, Promises, answer
from tercet.server.requests import Sample
from tercet.server.sampling import Draw, read_draw
from tercet.server.schedule import QUIET_S, Schedule, _Group
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


def whole_draw(number: int, prompt: list[int], **params: Any) -> Draw:
    """One without a limit of its own."""
    return draw_of(number, prompt=prompt, params={"max_tokens": None, **params})


def of_session(session_id: str, draw: Draw) -> Draw:
    return replace(draw, promise=Promise(draw.promise.request_id, draw.promise.key, session_id))


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


class FailingSampler(CountingSampler):
    """One that cannot draw from a certain prompt, nor from more of them than it has room for."""

    def __init__(self, bad: tuple[int, ...] = (), most: int = 1000) -> None:
        super().__init__()
        self.bad, self.most = bad, most

    def sample(self, prompts: Any, *args: Any, **settings: Any) -> Future[Any]:
        drawn = super().sample(prompts, *args, **settings)
        if self.bad not in prompts and len(prompts) <= self.most:
            return drawn
        failed: Future[Any] = Future()
        failed.set_exception(MemoryError("no room"))
        return failed


@pytest.mark.parametrize("bad", range(8))
def test_a_prompt_the_engine_fails_over_spoils_no_other(bad: int, caplog: pytest.LogCaptureFixture):
    draws = [draw_of(i, prompt=[i % 4, i // 4, 1]) for i in range(8)]
    sampler, schedule = FailingSampler(bad=draws[bad].prompt), Schedule()
    for draw in draws:
        schedule.draw("weights", lambda: sampler, draw)
    with caplog.at_level("CRITICAL", "tercet.server"):
        run(schedule, *(draw.promise for draw in draws))
    # Of 8, 4, 2 and 1 prompts the half with the bad one is tried again, and so are the halves beside it.
    assert sorted(sampler.calls) == [1, 1, 2, 2, 4, 4, 8]
    told = draws.pop(bad).promise.answer
    assert told is not None and b"the server failed: MemoryError: no room" in told.content
    for draw in draws:
        [[alone]] = CountingSampler().sample([draw.prompt], draw.params, 1, seeds=[draw.seed]).result()
        assert samples(draw.promise) == [np.asarray(alone.tokens, "<i4").tobytes()]


def test_requests_that_are_too_many_for_the_engine_at_once_are_drawn_in_parts():
    draws = [draw_of(i, prompt=[i % 4, 1]) for i in range(8)]
    sampler, schedule = FailingSampler(most=2), Schedule()
    for draw in draws:
        schedule.draw("weights", lambda: sampler, draw)
    run(schedule, *(draw.promise for draw in draws))
    assert sampler.calls == [8, 4, 2, 2, 4, 2, 2]
    for draw in draws:
        [[alone]] = CountingSampler().sample([draw.prompt], draw.params, 1, seeds=[draw.seed]).result()
        assert samples(draw.promise) == [np.asarray(alone.tokens, "<i4").tobytes()]


class TellingSampler(CountingSampler):
    """One in whose first call something happens on the event loop; prompts begin with the name of who asked."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, log: list[Any], happens: Callable[[], None]) -> None:
        super().__init__()
        self.log, self.happens = log, happens

    def sample(self, prompts: Any, *args: Any, **settings: Any) -> Future[Any]:
        if not self.log:
            happened = threading.Event()
            self.loop.call_soon_threadsafe(lambda: (self.happens(), happened.set()))
            assert happened.wait(60)
            time.sleep(2 * QUIET_S)  # what came is ripe
        self.log.append([prompt[0] for prompt in prompts])
        return super().sample(prompts, *args, **settings)


def drawn_in_slices(monkeypatch: pytest.MonkeyPatch, happens: Callable[..., None]) -> list[Any]:
    """What the engine does for 10 prompts of session 0 and one of session 1, four at a time."""
    monkeypatch.setattr("tercet.server.schedule.CALL_TOKENS", 24)
    monkeypatch.setattr("tercet.server.schedule.CALL_SAMPLES", 2)
    schedule, log = Schedule(), list[Any]()
    sampler = TellingSampler(log, lambda: happens(schedule, sampler, log))
    # 24 tokens are 4 requests for 2 samples of 3.
    draws = [of_session("0", draw_of(i, prompt=[0, i % 4], num_samples=2)) for i in range(10)]
    draws.append(of_session("1", draw_of(10, prompt=[1, 2], num_samples=2)))
    for draw in draws:
        schedule.draw("weights", lambda: sampler, draw)

    async def until_idle() -> None:
        sampler.loop = asyncio.get_running_loop()
        worker = asyncio.create_task(schedule.run())
        while schedule.groups or schedule.jobs:
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(schedule.rests_within, 60)
        await asyncio.sleep(0.01)
        worker.cancel()

    asyncio.run(until_idle())
    assert schedule.waiting_samples == 0
    for draw in draws:
        if draw.promise.answer is not None:
            [alone] = CountingSampler().sample([draw.prompt], draw.params, 2, seeds=[draw.seed]).result()
            assert samples(draw.promise) == [np.asarray(each.tokens, "<i4").tobytes() for each in alone]
            log.append("answered")
    return log


def test_a_large_group_is_drawn_in_slices_between_which_others_have_their_turn(monkeypatch: pytest.MonkeyPatch):
    late = [of_session("2", draw_of(20, prompt=[2, 1])), of_session("3", draw_of(21, prompt=[3, 1]))]

    def happens(schedule: Schedule, sampler: CountingSampler, log: list[Any]) -> None:
        assert schedule.waiting_samples == 2 * 7
        schedule.submit(Promise("", None, ""), lambda: log.append("job") or answer())
        schedule.draw("other weights", lambda: sampler, late[0])
        schedule.draw("weights", lambda: sampler, replace(late[1], n=2))

    log = drawn_in_slices(monkeypatch, happens)
    # Session 1 and 3 wait behind one request of session 0, not behind ten.
    assert log == [[0, 1, 0, 0], "job", [2], [0, 3, 0, 0], [0, 0, 0, 0], *["answered"] * 11]
    assert len(samples(late[0].promise)) == 1 and len(samples(late[1].promise)) == 2


def test_sessions_take_turns_from_slice_to_slice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tercet.server.schedule.CALL_TOKENS", 1)
    monkeypatch.setattr("tercet.server.schedule.CALL_SAMPLES", 2)
    group = _Group(CountingSampler, 0.0, 0.0)
    group.draws = [of_session(name, draw_of(i, num_samples=2)) for i, name in enumerate("aaabbc")]
    assert group.ripe_at() == 0.0  # there is a whole slice
    taken = [group.take()[0].promise.session_id for _ in range(3)]
    group.draws.append(of_session("d", draw_of(9, num_samples=2)))  # who comes late is not given what others had
    while group.draws:
        taken.append(group.take()[0].promise.session_id)
    assert taken == ["a", "b", "c", "a", "b", "d", "a"]


def test_between_slices_what_nobody_wants_any_more_is_dropped(monkeypatch: pytest.MonkeyPatch):
    def happens(schedule: Schedule, sampler: CountingSampler, log: list[Any]) -> None:
        assert len(schedule.drop(lambda promise: promise.session_id == "0")) == 7
        assert schedule.waiting_samples == 0

    assert drawn_in_slices(monkeypatch, happens) == [[0, 1, 0, 0], *["answered"] * 4]


@pytest.mark.parametrize(("leaves", "drawn"), [({"0"}, 8), ({"0", "1"}, 2)], ids=["one of two", "both"])
def test_a_call_that_nobody_wants_any_more_ends_where_its_next_samples_would_enter(leaves: set[str], drawn: int):
    schedule, seen, loops = Schedule(), list[list[int]](), list[asyncio.AbstractEventLoop]()

    def decode(tokens: list[int]) -> str:
        # Asked for after every token, in the middle of the engine's work.
        if not seen:
            left = threading.Event()
            loops[0].call_soon_threadsafe(lambda: (leave(), left.set()))
            assert left.wait(60)
        seen.append(tokens)
        return ""

    def leave() -> None:
        promises = Promises(kept_s=0.0, kept_unfetched_s=0.0, most_bytes=1)
        for session in sorted(leaves):  # one after another, as sessions end
            for promise in schedule.drop(lambda promise: promise.session_id == session):  # noqa: B023
                promises.forget(promise)

    sampler = FakeEngine(vocabulary=4, decode=decode, budgets=Budgets(max_rows=2)).sampler()
    draws = [of_session(str(i), draw_of(i, num_samples=4, params={"stop": "never"})) for i in range(2)]

    async def until_idle() -> None:
        loops.append(asyncio.get_running_loop())
        for draw in draws:
            schedule.draw("weights", lambda: sampler, draw)
        worker = asyncio.create_task(schedule.run())
        while schedule.calls == 0 or schedule.drawing:
            await asyncio.sleep(0.01)
        worker.cancel()

    asyncio.run(until_idle())
    # Two rows decode side by side, three tokens each.
    assert sum(len(tokens) == 3 for tokens in seen) == drawn
    assert all(draw.promise.done.is_set() for draw in draws)


def test_how_many_samples_wait_is_known_without_looking_at_them():
    schedule = Schedule()

    def seconds() -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(100):
                assert schedule.waiting_samples >= 0
            times.append(time.perf_counter() - began)
        return min(times)

    schedule.draw("weights", CountingSampler, draw_of(0))
    few, draw = seconds(), draw_of(1)
    for _ in range(20_000):
        schedule.draw("weights", CountingSampler, draw)
    assert schedule.waiting_samples == 20_001
    assert seconds() < 100 * few


def mostly_going_on() -> FakeEngine:
    """Four tokens: 0 ends a text; after 1 comes another 1 with 98 %, all else is even."""
    logits = torch.zeros(4, 4)
    logits[1] = torch.tensor([0.02, 0.979, 0.0005, 0.0005]).log()
    return FakeEngine(vocabulary=4, logits=logits, eos=frozenset({0}))


def test_prompts_of_many_lengths_without_a_limit_are_few_calls_and_each_ends_where_it_would_alone():
    engine, sampler, schedule = mostly_going_on(), CountingSampler(), Schedule()
    sampler.sampler = engine.sampler()
    # Every other prompt soon leaves the 1: 400 prompts of 20 lengths have room for 63 to 44 tokens.
    draws = [whole_draw(i, [2] * (i % 20) + [1 if i % 2 else 3]) for i in range(400)]
    for draw in draws:
        schedule.draw("weights", lambda: sampler, draw)
    run(schedule, *(draw.promise for draw in draws))
    # They share the limits 56, 48 and 40; whoever comes so far is drawn again, with those of the same length.
    *again, _, _, _ = ordered = sorted(sampler.calls)
    assert ordered[-3:] == [80, 160, 160]
    assert len(again) <= 20 and sum(again) < 200
    reached = {name: 0 for name in ("end", "beyond", "before")}
    for draw in draws:
        room = 64 - len(draw.prompt)
        alone = replace(draw.params, max_tokens=room)
        [[wanted]] = engine.sampler().sample([draw.prompt], alone, 1, seeds=[draw.seed]).result()
        [found] = answered(draw.promise).sequences
        assert tuple(np.frombuffer(found.tokens, "<i4")) == wanted.tokens
        assert np.frombuffer(found.logprobs, "<f4") == pytest.approx(np.asarray(wanted.logprobs), abs=1e-6)
        assert found.stop_reason == (1 if wanted.stop_reason == "length" else 0)
        shared = len(wanted.tokens) > draw.params.max_tokens
        reached["end" if len(wanted.tokens) == room else "beyond" if shared else "before"] += 1
    assert min(reached.values()) > 0


def test_prompts_whose_samples_nothing_ends_are_drawn_to_the_end_of_the_context_at_once():
    sampler, schedule = CountingSampler(), Schedule()
    draws = [whole_draw(i, [1] * (1 + i % 2), stop=[]) for i in range(4)]
    for draw in draws:
        schedule.draw("weights", lambda: sampler, draw)
    run(schedule, *(draw.promise for draw in draws))
    assert sampler.calls == [2, 2]
    assert [len(samples(draw.promise)[0]) // 4 for draw in draws] == [63, 62, 63, 62]


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
    promises = Promises(kept_s=0.0, kept_unfetched_s=1000.0, most_bytes=10_000)
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
    first.fetched()
    promises.tidy()
    assert promises.get(first.request_id) is None
    assert promises.of(("model", 1), "session")[1]
