"""The endpoints: what they refuse and in which shape, and what they list."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tercet.server.store import Run, now
from tests.unit.server.asking import Client, busy, creation, sample, service_in, step, tell


async def saved(client: Client, *names: str) -> str:
    """A model with checkpoints of these names; its run's id."""
    model = await client.model(await client.session())
    for number, name in enumerate(names, start=1):
        await client.do("save_weights", {"model_id": model, "seq_id": number, "path": name})
    return model


def test_a_huge_number_of_samples_is_refused_at_once(tmp_path: Path):
    async def story(client: Client) -> None:
        sampler = await client.base_sampler(await client.session())
        status, told = await client.ask("POST", "asample", sample(sampler, 0, [0], num_samples=10**9))
        assert status == 200 and len(told["sample_sequence_ids"]) == 3
        failed = (await client.retrieve(told["request_id"]))[1]
        assert failed == {"error": "num_samples is 1000000000; it must be from 1 to 3", "category": "user"}
        status, told = await client.ask("POST", "asample", sample(sampler, 1, [0], num_samples=3))
        assert len(set(told["sample_sequence_ids"])) == 3
        assert isinstance((await client.retrieve(told["request_id"]))[1], bytes)

    tell(service_in(tmp_path, samples=3), story)


def test_too_many_waiting_samples_are_told_to_come_back(tmp_path: Path):
    async def story(client: Client) -> None:
        sampler = await client.base_sampler(await client.session())
        with busy(client.service):
            first = await client.promised("asample", sample(sampler, 0, [0], num_samples=2))
            status, told = await client.ask("POST", "asample", sample(sampler, 1, [0]))
            assert status == 429 and told["detail"].startswith("2 samples wait already")
            # What waits itself may be asked for again.
            assert await client.promised("asample", sample(sampler, 0, [0], num_samples=2)) == first
        assert isinstance((await client.retrieve(first))[1], bytes)
        assert isinstance(await client.do("asample", sample(sampler, 1, [0])), bytes)

    tell(service_in(tmp_path, waiting_samples=2), story)


@pytest.mark.parametrize(("body_mb", "most"), [(256, 50_000_000), (2, 1_000_000)])
def test_clients_are_told_to_send_pieces_that_are_taken(tmp_path: Path, body_mb: int, most: int):
    async def story(client: Client) -> None:
        status, told = await client.ask("POST", "client/config", {"sdk_version": "0.38.0"})
        assert (status, told["fwdbwd_max_chunk_bytes_count"]) == (200, most)
        assert (await client.ask("POST", "client/config", {"sdk_version": "0.37.0"}))[0] == 400

    tell(service_in(tmp_path, body_mb=body_mb), story)


def test_what_the_server_cannot_do_itself_is_told_in_the_sdks_shape(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client)
        client.service.store.root = None  # type: ignore[assignment]
        status, told = await client.ask("GET", f"training_runs/{run}")
        assert status == 500 and told["detail"].startswith("the server failed: TypeError")
        assert await client.ask("GET", "healthz") == (200, {"status": "ok"})

    tell(service_in(tmp_path), story)


def test_what_is_not_there_is_named(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client)
        for method, path, body, wanted, said in (
            ("GET", "training_runs/nobody", None, 404, "there is no training run nobody"),
            ("GET", "sessions/nobody", None, 404, "there is no session nobody"),
            ("GET", "samplers/nobody", None, 404, "there is no sampler nobody"),
            ("POST", "retrieve_future", {"request_id": "nobody"}, 410, "the request nobody is not known here"),
            ("POST", "get_info", {"model_id": "nobody"}, 404, "there is no model nobody"),
            ("POST", "weights_info", {"tinker_path": f"tinker://{run}/weights/a"}, 404, "there is no checkpoint"),
            ("POST", "weights_info", {"tinker_path": "a"}, 400, "'a' names no checkpoint here"),
            ("POST", "weights_info", {}, 422, "body.tinker_path: Field required"),
            ("DELETE", "nothing", None, 404, "DELETE /api/v1/nothing is no endpoint"),
        ):
            status, told = await client.ask(method, path, body)
            assert (status, said in told["detail"]) == (wanted, True), (path, told)

    tell(service_in(tmp_path), story)


def test_checkpoints_are_listed_given_a_time_and_deleted_once(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client, "a", "b", "c")
        paths = [f"training_runs/{run}/checkpoints/weights/{name}" for name in "abc"]
        half = client.service.store.root / run / "weights" / "d.tmp-new"
        half.mkdir()
        (half / "checkpoint.json").write_text("{")

        async def listed(path: str) -> list[str]:
            return [each["checkpoint_id"] for each in (await client.ask("GET", path))[1]["checkpoints"]]

        assert await listed(f"training_runs/{run}/checkpoints") == ["weights/c", "weights/b", "weights/a"]
        assert await listed("checkpoints?limit=1&offset=1") == ["weights/b"]
        assert (await client.ask("GET", "checkpoints?limit=1"))[1]["cursor"]["total_count"] == 3
        assert (await client.ask("PUT", f"{paths[2]}/ttl", {"ttl_seconds": 0}))[0] == 204
        assert (await client.ask("PUT", f"{paths[1]}/ttl", {"ttl_seconds": 3600}))[0] == 204
        assert await listed("checkpoints") == ["weights/b", "weights/a"]
        found = (await client.ask("GET", f"training_runs/{run}"))[1]["last_checkpoint"]
        assert found["checkpoint_id"] == "weights/b" and found["expires_at"] is not None
        assert (await client.ask("PUT", f"{paths[2]}/ttl", {"ttl_seconds": None}))[0] == 404
        status, packed = await client.ask("GET", f"{paths[0]}/archive")
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            assert status == 200 and "table.safetensors" in tar.getnames()
        assert [(await client.ask("DELETE", paths[0]))[0] for _ in range(2)] == [204, 404]
        client.service.tidy()
        left = {path.name for path in (client.service.store.root / run / "weights").iterdir()}
        assert left == {"b", "d.tmp-new"}

    tell(service_in(tmp_path), story)


def test_runs_and_sessions_are_listed_the_newest_first(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client)
        for name in ("late", "later"):
            client.service.store.begin(Run(name, "tiny", "tiny", 4, {"of": name}, now(), now()))
        status, told = await client.ask("GET", "training_runs?limit=2")
        assert [each["training_run_id"] for each in told["training_runs"]] == ["later", "late"]
        assert (status, told["cursor"]) == (200, {"offset": 0, "limit": 2, "total_count": 3})
        [last] = (await client.ask("GET", "training_runs?limit=2&offset=2"))[1]["training_runs"]
        assert (last["training_run_id"], last["lora_rank"], last["last_checkpoint"]) == (run, 8, None)
        first, second = run.partition(":")[0], await client.session()
        assert (await client.ask("GET", "sessions"))[1]["sessions"] == [second, first]
        assert (await client.ask("GET", "sessions?limit=1&offset=1"))[1]["sessions"] == [first]
        capable = (await client.ask("GET", "get_server_capabilities"))[1]["supported_models"]
        assert [each["model_name"] for each in capable] == ["tiny", "other"]

    tell(service_in(tmp_path), story)


def test_what_is_out_of_range_is_refused_and_leaves_nothing(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client, "a")
        for path in ("training_runs", "checkpoints", "sessions"):
            for asked in ("limit=-1", "offset=-1"):
                status, told = await client.ask("GET", f"{path}?{asked}")
                assert status == 422 and "should be greater than or equal to 0" in told["detail"], path
        asked = {"model_id": run, "seq_id": 2, "path": "b", "ttl_seconds": 10**12}
        told = await client.do("save_weights", asked)
        assert told["error"].startswith("ttl_seconds is 1000000000000; it must be from 0 to 315360000")
        assert [path.name for path in (client.service.store.root / run / "weights").iterdir()] == ["a"]
        status, told = await client.ask(
            "PUT", f"training_runs/{run}/checkpoints/weights/a/ttl", {"ttl_seconds": 10**12}
        )
        assert status == 400 and "ttl_seconds is 1000000000000" in told["detail"]
        assert "path" in await client.do("save_weights", {"model_id": run, "seq_id": 3, "path": "b"})

    tell(service_in(tmp_path), story)


def test_metadata_come_back_as_texts_whatever_was_sent(tmp_path: Path):
    given = {"who": "me", "step": 3, "deep": {"tags": ["a"]}, "none": None}
    texts = {"who": "me", "step": "3", "deep": '{"tags": ["a"]}', "none": "null"}

    async def story(client: Client) -> None:
        opened = {"sdk_version": "0.38.0", "user_metadata": given}
        session = str((await client.ask("POST", "create_session", opened))[1]["session_id"])
        model = (await client.do("create_model", creation(session, user_metadata=given)))["model_id"]
        asked = {"model_id": model, "seq_id": 1, "path": "a", "user_metadata": given}
        await client.do("save_weights", asked)
        [run] = (await client.ask("GET", "training_runs"))[1]["training_runs"]
        [checkpoint] = (await client.ask("GET", "checkpoints"))[1]["checkpoints"]
        told = (await client.ask("GET", f"sessions/{session}"))[1]
        for each in (run, run["last_checkpoint"], checkpoint, told):
            assert each["user_metadata"] == texts

    tell(service_in(tmp_path), story)


def test_a_run_knows_when_it_was_last_asked_for_something(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        run = await client.model(session)

        async def last() -> str:
            return str((await client.ask("GET", f"training_runs/{run}"))[1]["last_request_time"])

        at_first = await last()
        await client.do("optim_step", step(run, 1))
        then = await last()
        assert then > at_first
        await client.ask("POST", f"sessions/{session}/finish", {})
        await client.model(await client.session())  # it comes after the end of the other in the queue
        assert await last() == then

    tell(service_in(tmp_path), story)


def test_half_a_character_in_metadata_is_refused_and_every_list_still_comes(tmp_path: Path):
    async def story(client: Client) -> None:
        session = await client.session()
        model = await client.model(session)
        for odd in ({"a": "\ud800"}, {"\ud800": "a"}, {"a": [{"b": "x\udfff"}]}):
            for path, body in (
                ("create_session", {"sdk_version": "0.38.0"}),
                ("create_model", creation(session, 1)),
                ("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}),
            ):
                status, told = await client.ask("POST", path, {**body, "user_metadata": odd})
                assert status == 422 and "user_metadata" in told["detail"], path
                assert "half of a character (surrogates not allowed); send whole ones" in told["detail"]
        whole = {"who": "\u00e9 \U0001f600"}
        await client.do("save_weights", {"model_id": model, "seq_id": 1, "path": "a", "user_metadata": whole})
        assert (await client.ask("GET", "checkpoints"))[1]["checkpoints"][0]["user_metadata"] == whole
        assert [(await client.ask("GET", path))[0] for path in ("training_runs", "sessions")] == [200, 200]

    tell(service_in(tmp_path), story)


def test_what_an_earlier_server_kept_of_half_a_character_spoils_no_list(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client, "a")
        note = client.service.store.root / run / "weights" / "a" / "checkpoint.json"
        note.write_text(note.read_text().replace('"user_metadata": null', '"user_metadata": {"a\\udfff": "\\ud800b"}'))
        status, told = await client.ask("GET", "checkpoints")
        assert (status, told["checkpoints"][0]["user_metadata"]) == (200, {"a?": "?b"})

    tell(service_in(tmp_path), story)


def test_a_damaged_record_is_told_to_who_asks_for_it_and_spoils_no_list(tmp_path: Path):
    async def story(client: Client) -> None:
        run = await saved(client, "a", "b")
        folder = client.service.store.root / run
        (folder / "weights" / "a" / "checkpoint.json").write_text("{")
        for path in ("checkpoints", f"training_runs/{run}/checkpoints"):
            status, told = await client.ask("GET", path)
            assert (status, [each["checkpoint_id"] for each in told["checkpoints"]]) == (200, ["weights/b"])
        status, told = await client.ask("POST", "weights_info", {"tinker_path": f"tinker://{run}/weights/a"})
        assert status == 404 and "weights/a/checkpoint.json is damaged (JSONDecodeError" in told["detail"]
        (folder / "run.json").write_text("{")
        for path in ("checkpoints", "training_runs"):
            assert (await client.ask("GET", path))[1]["cursor"]["total_count"] == 0
        status, told = await client.ask("GET", f"training_runs/{run}")
        assert status == 404 and "run.json is damaged" in told["detail"]

    tell(service_in(tmp_path), story)
