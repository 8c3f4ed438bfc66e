"""What a server does with requests: once, in order, for as long as somebody wants it, and for each client by itself."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.server import service as at_service
from tercet.server import sessions as at_sessions
from tercet.server.service import Service
from tercet.server.sessions import Samplers
from tests.unit.server.asking import Client, busy, creation, learning, sample, service_in, step, tell

# After one step of 0.1 the logit of the learned token is 0.2 above those of the three others.
ONE_STEP = -math.log(1 + 3 * math.exp(-0.2))
EVEN = -math.log(4)


def test_a_step_that_is_sent_again_is_done_once(tmp_path: Path):
    async def story(client: Client) -> None:
        model = await client.model(await client.session())
        await client.do("forward_backward", learning(model, 1, [0, 1]))
        first = await client.promised("optim_step", step(model, 2))
        assert [await client.promised("optim_step", step(model, 2)) for _ in range(2)] == [first, first]
        answers = [await client.retrieve(first) for _ in range(2)]
        assert answers[0] == answers[1]
        # The gradient was (p - 1, p, p, p) with p = 1/4 but for sign.
        assert answers[0][1]["metrics"]["grad_norm"] == pytest.approx(math.sqrt(0.75**2 + 3 * 0.25**2))
        sampler = await client.sampler(model, 3, 0)
        assert (await client.logprobs(sampler, 0, [0, 1]))[1] == pytest.approx(ONE_STEP, abs=1e-5)

    tell(service_in(tmp_path), story)


def test_prompts_of_one_sampler_are_told_apart_by_their_number_and_lone_ones_by_their_key(tmp_path: Path):
    async def story(client: Client) -> None:
        sampler = await client.base_sampler(await client.session())
        first = await client.promised("asample", sample(sampler, 0, [0]))
        assert await client.promised("asample", sample(sampler, 0, [0])) == first
        assert await client.promised("asample", sample(sampler, 1, [0])) != first
        lone = sample(None, None, [0], base_model="tiny")
        keys = [{"x-idempotency-key": key} for key in ("a", "a", "b")] + [{}, {}]
        asked = [await client.promised("asample", lone, **key) for key in keys]
        assert asked[0] == asked[1] and len(set(asked)) == 4

    tell(service_in(tmp_path), story)


def test_an_answer_is_waited_for_and_asked_for_again_where_it_takes_long(tmp_path: Path, monkeypatch):
    async def story(client: Client) -> None:
        model = await client.model(await client.session())
        monkeypatch.setattr(at_service, "LONG_POLL_S", 0.05)
        with busy(client.service):
            asked = await client.promised("optim_step", step(model, 1))
            assert await client.retrieve(asked) == (
                200,
                {"type": "try_again", "request_id": asked, "queue_state": "active"},
            )
        monkeypatch.setattr(at_service, "LONG_POLL_S", 30.0)
        assert (await client.retrieve(asked))[1]["metrics"]["learning_rate"] == 0.1

    tell(service_in(tmp_path), story)


def test_an_answer_is_forgotten_a_while_after_it_was_fetched(tmp_path: Path):
    async def story(client: Client) -> None:
        model = await client.model(await client.session())
        sampler = await client.sampler(model, 1, 0)
        asked = [
            await client.promised("optim_step", step(model, 2)),
            await client.promised("optim_step", step(model, 3)),
        ]
        drawn = await client.promised("asample", sample(sampler, 0, [0]))
        for each in (*asked, drawn):
            await client.retrieve(each)
        client.service.tidy()
        assert [(await client.retrieve(each))[0] for each in (*asked, drawn)] == [200] * 3
        client.service.promises.kept_s = 0.0
        client.service.tidy()
        # A sample is asked for anew. A step cannot be: both replies may have been lost on one connection that broke.
        assert [(await client.retrieve(each))[0] for each in (*asked, drawn)] == [200, 200, 410]
        # Whoever has the answer to what they asked after it has its own too.
        later = await client.promised("optim_step", step(model, 4))
        client.service.tidy()
        assert [(await client.retrieve(each))[0] for each in asked] == [200, 200]
        await client.retrieve(later)
        client.service.tidy()
        assert [(await client.retrieve(each))[0] for each in (*asked, later)] == [410, 410, 200]
        told = (await client.retrieve(asked[0]))[1]
        assert "its answer was kept long enough" in told["detail"]
        # Its number is used up: what comes under it now is not done.
        again = await client.do("optim_step", step(model, 2))
        assert "has done its request 2 already" in again["error"]

    tell(service_in(tmp_path), story)


def test_what_follows_a_lost_request_is_given_up_and_training_goes_on(tmp_path: Path, monkeypatch):
    async def story(client: Client) -> None:
        model = await client.model(await client.session())
        waiting = [await client.promised("optim_step", step(model, number)) for number in (3, 2)]
        client.service.tidy()
        assert [client.service.promises.by_id[each].answer for each in waiting] == [None, None]
        monkeypatch.setattr(at_sessions, "LOST_AFTER_S", 0.0)
        client.service.tidy()
        for each in waiting:
            _, told = await client.retrieve(each)
            assert told["error"].startswith(f"request 1 of {model} never came") and told["category"] == "server"
        assert "metrics" in await client.do("optim_step", step(model, 4))

    tell(service_in(tmp_path), story)


def test_the_end_of_a_session_lets_go_of_all_it_had(tmp_path: Path):
    async def story(client: Client) -> None:
        session, service = await client.session(), client.service
        model = await client.model(session)
        kept = await client.sampler(model, 1, 0)
        with busy(service):
            queued = await client.promised(
                "save_weights_for_sampler", {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 1}
            )
            after_a_gap = await client.promised("optim_step", step(model, 4))
            drawn = await client.promised("asample", sample(kept, 0, [0]))
            ended = {"reason": {"type": "errored"}}
            assert (await client.ask("POST", f"sessions/{session}/finish", ended))[0] == 204
            assert (await client.ask("POST", f"sessions/{session}/finish", {}))[0] == 204
        assert service.sessions[session].finished == "errored"
        assert f"the session {session} is over" in (await client.retrieve(queued))[1]["error"]
        assert [(await client.retrieve(each))[0] for each in (after_a_gap, drawn)] == [410, 410]
        assert (len(service.samplers), service.entries, service.models) == (0, {}, {})
        assert (await client.ask("POST", "optim_step", step(model, 5)))[0] == 404
        assert (await client.ask("POST", "asample", sample(kept, 1, [0])))[0] == 404
        assert (await client.ask("POST", "session_heartbeat", {"session_id": session}))[0] == 410

    tell(service_in(tmp_path), story)


def test_the_end_of_a_session_drops_what_waits_to_be_learned_but_for_what_a_save_is_to_write(tmp_path: Path):
    async def story(client: Client) -> None:
        session, other = await client.session(), await client.session()
        saved, unsaved = await client.model(session, 0), await client.model(session, 1)
        third = await client.model(other)

        async def learn_and_step(model: str, seq_id: int) -> list[str]:
            return [
                await client.promised("forward_backward", learning(model, seq_id, [0, 1])),
                await client.promised("optim_step", step(model, seq_id + 1)),
            ]

        with busy(client.service):
            needed = await learn_and_step(saved, 1)
            save = await client.promised("save_weights", {"model_id": saved, "seq_id": 3, "path": "kept"})
            dropped = [*await learn_and_step(saved, 4), *await learn_and_step(unsaved, 1)]
            elsewhere = await learn_and_step(third, 1)
            assert (await client.ask("POST", f"sessions/{session}/finish", {}))[0] == 204
            assert [(await client.retrieve(each))[0] for each in dropped] == [410] * 4
        path = (await client.retrieve(save))[1]["path"]
        for _, optim in (needed, elsewhere):
            assert (await client.retrieve(optim))[1]["metrics"]["grad_norm"] > 0
        # What was saved is what was asked for: one step, and no more.
        asked = {"session_id": other, "model_seq_id": 1, "path": path}
        again = (await client.do("load_weights", asked))["model_id"]
        found = await client.logprobs(await client.sampler(again, 1, 0), 0, [0, 1])
        assert found[1] == pytest.approx(ONE_STEP, abs=1e-5)

    tell(service_in(tmp_path), story)


def test_requests_are_done_by_their_number_however_they_arrive(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model, straight, reversed_ = [await client.model(session, number) for number in range(3)]
        late = await client.promised("optim_step", step(model, 2))
        await client.promised("forward_backward", learning(model, 1, [0, 1]))
        assert (await client.retrieve(late))[1]["metrics"]["grad_norm"] == pytest.approx(math.sqrt(0.75))
        # Done as it arrived, a step without a gradient before it would say so.
        assert (await client.do("optim_step", step(model, 3)))["metrics"]["grad_norm"] == 0

        async def three_steps(model: str, numbers: list[int]) -> list[float]:
            targets = {1: [0, 1], 3: [0, 2], 5: [0, 3]}
            for number in numbers:
                if number in targets:
                    await client.promised("forward_backward", learning(model, number, targets[number]))
                else:
                    await client.promised("optim_step", step(model, number))
            sampler = await client.sampler(model, 7, int(model[-1]))
            return [(await client.logprobs(sampler, i, [0, i]))[1] for i in range(4)]

        in_order = await three_steps(straight, [1, 2, 3, 4, 5, 6])
        assert await three_steps(reversed_, [6, 5, 4, 3, 2, 1]) == in_order
        # Adam's mean of gradients leans to the last: which token was learned when is to be seen.
        assert len({round(each, 3) for each in in_order}) == 4

    tell(service_in(tmp_path), story)


def test_a_silent_session_is_not_drawn_for_and_is_over_in_the_end(tmp_path: Path):
    async def story(client: Client) -> None:
        session, service = await client.session(), client.service
        sampler = await client.base_sampler(session)
        model = await client.model(session)
        state = service.sessions[session]
        with busy(service):
            drawn = await client.promised("asample", sample(sampler, 0, [0]))
            state.heard_at -= 91
            service.tidy()
            assert (await client.retrieve(drawn))[0] == 410
        assert state.finished is None and model in service.models
        state.heard_at -= 10
        service.tidy()
        assert (state.finished, service.models) == ("interrupted", {})
        assert (await client.ask("GET", f"sessions/{session}"))[1]["training_run_ids"] == [model]
        state.heard_at -= 100
        service.tidy()
        assert (await client.ask("GET", f"sessions/{session}"))[0] == 404

    tell(service_in(tmp_path, session_timeout_s=100.0), story)


def test_a_request_without_a_number_is_refused(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model, sampler = await client.model(session), await client.base_sampler(session)
        path = "tinker://a/weights/b"
        for endpoint, body in (
            ("asample", sample(sampler, None, [0])),
            ("asample", sample(sampler, -1, [0])),
            ("optim_step", step(model, 0)),
            ("load_weights", {"model_id": model, "path": path}),
            ("load_weights", {"session_id": session, "path": path}),
            ("create_model", creation(session, -1)),
            ("forward_backward", learning(model, 0, [0, 1])),
        ):
            status, told = await client.ask("POST", endpoint, body)
            assert status == 400 and "every request has a number of its own" in told["detail"], endpoint

    tell(service_in(tmp_path), story)


def test_a_model_that_could_not_be_made_takes_no_room_and_its_requests_are_told(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        with busy(client.service):
            failing = await client.promised("create_model", creation(session, optimizer_config={"type": "dimuon"}))
            model = f"{session}:train:0"
            asked = [await client.promised("optim_step", step(model, number)) for number in (1, 3)]
        assert "the optimizer 'dimuon' is not here" in (await client.retrieve(failing))[1]["error"]
        for each in asked:
            assert "could not be made" in (await client.retrieve(each))[1]["error"]
        made = await client.model(session, 1)
        assert (await client.ask("GET", f"sessions/{session}"))[1]["training_run_ids"] == [made]
        full = await client.do("create_model", creation(session, 2))
        assert full["error"].startswith("1 models are in training already; finish a session")

    tell(service_in(tmp_path, models=1), story)


def test_a_creation_that_comes_again_late_leaves_the_model_alone(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model = await client.model(session)
        trainer = client.service.models[model].trainer
        again = await client.promised("create_model", creation(session))
        assert (await client.retrieve(again))[1]["model_id"] == model
        client.service.promises.kept_unfetched_s = 0.0
        client.service.tidy()
        assert "is there already" in (await client.do("create_model", creation(session)))["error"]
        assert client.service.models[model].trainer is trainer

    tell(service_in(tmp_path), story)


def test_a_state_is_taken_over_in_place_or_not_at_all(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model, other = await client.model(session, 0, rank=8), await client.model(session, 1, rank=4)
        await client.do("forward_backward", learning(other, 1, [0, 1]))
        await client.do("optim_step", step(other, 2))
        path = (await client.do("save_weights", {"model_id": other, "seq_id": 3, "path": "one"}))["path"]
        load = {"model_id": model, "path": path, "optimizer": True}
        # A file of the optimizer is away for a while.
        directory = client.service.store.checkpoint(path).directory
        away = directory / "optimizer.safetensors"
        away.rename(tmp_path / "away")
        assert "error" in await client.do("load_weights", {**load, "seq_id": 1})
        assert (await client.logprobs(await client.sampler(model, 2, 0), 0, [0, 1]))[1] == pytest.approx(EVEN)
        assert (await client.ask("POST", "get_info", {"model_id": model}))[1]["lora_rank"] == 8
        (tmp_path / "away").rename(away)
        await client.do("load_weights", {**load, "seq_id": 3})
        found = await client.logprobs(await client.sampler(model, 4, 1), 0, [0, 1])
        assert found[1] == pytest.approx(ONE_STEP, abs=1e-5)
        assert (await client.ask("POST", "get_info", {"model_id": model}))[1]["lora_rank"] == 4
        assert (await client.ask("GET", f"training_runs/{model}"))[1]["lora_rank"] == 4

    tell(service_in(tmp_path), story)


def test_a_checkpoint_keeps_its_rank_when_its_run_goes_on_from_another(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model, other = await client.model(session, 0, rank=8), await client.model(session, 1, rank=4)
        a = (await client.do("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}))["path"]
        b = (await client.do("save_weights", {"model_id": other, "seq_id": 1, "path": "b"}))["path"]
        await client.do("load_weights", {"model_id": model, "seq_id": 2, "path": b, "optimizer": True})
        ranks = [(await client.ask("POST", "weights_info", {"tinker_path": path}))[1]["lora_rank"] for path in (a, b)]
        assert ranks == [8, 4]
        asked = {"session_id": session, "model_seq_id": 2, "path": a}
        again = (await client.do("load_weights", asked))["model_id"]
        assert (await client.ask("POST", "get_info", {"model_id": again}))[1]["lora_rank"] == 8

    tell(service_in(tmp_path), story)


def test_a_checkpoint_fits_its_model_however_the_directory_is_spelled(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths: list[str] = []

    def serving(name: str) -> Service:
        service, directory = service_in(tmp_path), (tmp_path / name).resolve()
        directory.mkdir(exist_ok=True)
        service.served = replace(service.served, name=name, tokenizer=directory)
        return service

    async def save(client: Client) -> None:
        model = await client.model(await client.session())
        paths.append((await client.do("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}))["path"])

    async def load(client: Client) -> None:
        asked = {"session_id": await client.session(), "model_seq_id": 0, "path": paths[0]}
        told = await client.do("load_weights", asked)
        paths.append(told.get("path", told.get("error")))

    for name, story in (("model", save), (str(tmp_path / "model"), load), ("./model", load), ("other", load)):
        tell(serving(name), story)
    assert paths[1:3] == [paths[0]] * 2
    assert paths[3].endswith(f"trained on {tmp_path / 'model'}, and this server serves {tmp_path / 'other'}")


def test_a_sampler_of_a_checkpoint_never_draws_from_what_replaced_it(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model = await client.model(session)

        async def save(seq_id: int, name: str) -> str:
            asked = {"model_id": model, "seq_id": seq_id, "path": name, "overwrite": True}
            return str((await client.do("save_weights", asked))["path"])

        async def sampler(number: int, path: str) -> str:
            asked = {"session_id": session, "sampling_session_seq_id": number, "model_path": path}
            return str((await client.ask("POST", "create_sampling_session", asked))[1]["sampling_session_id"])

        x, y, z = [await save(seq_id, name) for seq_id, name in ((1, "x"), (2, "y"), (3, "z"))]
        late, early, without = [await sampler(number, path) for number, path in enumerate((x, y, z))]
        assert (await client.logprobs(early, 0, [0, 1]))[1] == pytest.approx(EVEN)
        await client.do("forward_backward", learning(model, 4, [0, 1]))
        await client.do("optim_step", step(model, 5))
        await save(6, "x")
        await save(7, "y")
        client.service.store.delete(client.service.store.checkpoint(z))
        told = await client.do("asample", sample(late, 0, [0]))
        assert told["error"].startswith(f"{x} was saved anew after the sampler {late} of it was made")
        assert (await client.logprobs(early, 1, [0, 1]))[1] == pytest.approx(EVEN)
        assert f"there is no checkpoint {z}" in (await client.do("asample", sample(without, 0, [0])))["error"]
        new = await sampler(3, x)
        assert (await client.logprobs(new, 0, [0, 1]))[1] == pytest.approx(ONE_STEP, abs=1e-5)

    tell(service_in(tmp_path), story)


def test_a_cancelled_sample_is_not_drawn_and_one_that_is_there_stays(tmp_path: Path):
    async def story(client: Client) -> None:
        sampler = await client.base_sampler(await client.session())
        with busy(client.service):
            first, second = [await client.promised("asample", sample(sampler, number, [0])) for number in (0, 1)]
            assert await client.ask("POST", "cancel_future", {"request_id": first}) == (204, b"")
            assert client.service.schedule.waiting_samples == 1
            assert (await client.retrieve(first))[0] == 410
        drawn = await client.retrieve(second)
        assert isinstance(drawn[1], bytes)
        for each in (second, "nobody"):
            assert (await client.ask("POST", "cancel_future", {"request_id": each}))[0] == 204
        assert await client.retrieve(second) == drawn
        assert isinstance(await client.do("asample", sample(sampler, 0, [0])), bytes)

    tell(service_in(tmp_path), story)


def test_whoever_keeps_most_samplers_makes_room_for_the_next(tmp_path: Path):
    async def story(client: Client) -> None:
        many, one = await client.session(), await client.session()
        lone = await client.sampler(await client.model(one), 1, 0)
        model = await client.model(many)
        samplers = [await client.sampler(model, number, number) for number in (1, 2)]
        await client.logprobs(samplers[0], 0, [0, 1])  # the second is now the one unused longest
        samplers.append(await client.sampler(model, 3, 3))
        for sampler, there in zip([lone, *samplers], (True, True, False, True), strict=True):
            found = await client.do("asample", sample(sampler, 1, [0]))
            assert isinstance(found, bytes) == there
        told = await client.do("asample", sample(samplers[1], 2, [0]))
        assert "has made room for newer ones; save it with a name" in told["error"]

    tell(service_in(tmp_path, samplers=3), story)


def test_samplers_that_can_be_read_again_are_read_again():
    samplers, read = Samplers(2), []

    def make(name: str) -> Any:
        return lambda: read.append(name) or name

    samplers.keep("own", "own", "session")
    for name in ("a", "b", "a", "a"):
        assert samplers.get(name, make(name)) == name
    assert read == ["a", "b", "a"] and len(samplers) == 2
    assert samplers.get("own", make("again")) == "own"
    samplers.drop("own")
    assert samplers.get("own", make("again")) == "again"


def test_the_last_logprobs_of_a_prompt_stand_at_its_end(tmp_path: Path):
    # After token t the token t + 1 has the probability 1 / 2, 1 / 3, 1 / 4; the others share the rest.
    p = torch.full((4, 4), 0.0)
    for t, own in enumerate((1 / 2, 1 / 3, 1 / 4)):
        p[t] = (1 - own) / 3
        p[t, t + 1] = own
    p[3] = 1 / 4

    async def story(client: Client) -> None:
        sampler = await client.base_sampler(await client.session())
        whole = await client.logprobs(sampler, 0, [0, 1, 2, 3])
        assert math.isnan(whole[0])
        assert whole[1:] == pytest.approx([-math.log(2), -math.log(3), -math.log(4)], abs=1e-5)
        last = await client.logprobs(sampler, 1, [0, 1, 2, 3], prompt_logprobs_last_n=2)
        assert [math.isnan(each) for each in last] == [True, True, False, False]
        assert last[2:] == pytest.approx(whole[2:])

    tell(service_in(tmp_path, p.log()), story)


def test_tidying_goes_on_after_what_it_could_not_read(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(at_service, "TIDY_EVERY_S", 0.01)

    async def story(client: Client) -> None:
        model = await client.model(await client.session())
        path = (await client.do("save_weights", {"model_id": model, "seq_id": 1, "path": "brief"}))["path"]
        store = client.service.store
        brief, past = store.checkpoint(path), "2020-01-01T00:00:00+00:00"
        note = json.dumps({**json.loads((brief.directory / "checkpoint.json").read_text()), "expires_at": past})
        root, client.service.store.root = store.root, None  # type: ignore[assignment]
        with caplog.at_level(logging.ERROR, "tercet.server"):
            while not caplog.records:
                await asyncio.sleep(0.01)
        assert "not everything could be tidied" in caplog.text
        store.root = root
        (brief.directory / "checkpoint.json").write_text(note)
        while brief.directory.exists():
            await asyncio.sleep(0.01)

    tell(service_in(tmp_path), story)
