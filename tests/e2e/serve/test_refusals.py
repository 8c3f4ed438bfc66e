"""What `tercet serve` refuses, and how: in the SDK's own shape, and without harm to anyone else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import CommandLine
from tests.e2e.serve.serving import ADAM, Server, data, datum, kept, new_model, start, tinker, types
from tests.unit.server.asking import learning, step

# What the SDK warns of is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (
            lambda model: model.forward_backward(data(), "stable"),
            "there is no loss 'stable' here; there are cross_entropy",
        ),
        (lambda model: model.forward_backward(data(), "cross_entropy", {"beta": 1.0}), "has no setting 'beta'"),
        (lambda model: model.forward_backward(data(), "ppo"), "datum 0 lacks logprobs, which ppo needs"),
        (lambda model: model.forward_backward([datum([40, 9999])], "cross_entropy"), "has the token 9999"),
        (
            lambda model: model.optim_step(types.AdamParams(grad_clip_norm=-1.0)),
            "grad_clip_norm is -1.0; it must be above 0, or 0 not to clip",
        ),
        (lambda model: model.save_state("../../escape"), "cannot name a checkpoint"),
        (lambda model: model.save_state("long", ttl_seconds=10**12), "it must be from 0 to 315360000 (ten years)"),
        (lambda model: model.load_state("tinker://a/weights/../../x"), "names no checkpoint here"),
        (lambda model: model.load_state("tinker://nobody/weights/none"), "there is no checkpoint"),
    ],
    ids=["loss", "setting", "inputs", "token", "clipping", "name", "time", "path", "absent"],
)
def test_a_bad_request_is_told_and_the_model_goes_on(client: Any, ask: Any, told: str):
    model = new_model(client)
    with pytest.raises(tinker.RequestFailedError, match=re.escape(told)):
        ask(model).result()
    assert model.optim_step(types.AdamParams(**ADAM)).result().metrics["grad_norm"] == 0


def test_a_bad_prompt_spoils_no_other(client: Any):
    sampler = client.create_sampling_client(base_model="tiny").result()
    params = types.SamplingParams(max_tokens=4)
    prompts = [[40, 41], [100_000], [42]]
    asked = [
        sampler.sample(prompt=types.ModelInput.from_ints(each), num_samples=1, sampling_params=params)
        for each in prompts
    ]
    with pytest.raises(tinker.RequestFailedError, match="the prompt has the token 100000; the model knows 0 to 511"):
        asked[1].result()
    assert [len(asked[i].result().sequences) for i in (0, 2)] == [1, 1]


def test_a_sample_ends_where_the_context_does(client: Any):
    sampler = client.create_sampling_client(base_model="tiny").result()
    prompt = types.ModelInput.from_ints([40] * 1000)
    long = types.SamplingParams(max_tokens=5000, stop=[])
    [found] = sampler.sample(prompt=prompt, num_samples=1, sampling_params=long).result().sequences
    assert (len(found.tokens), found.stop_reason) == (24, "length")
    # Beyond what fits, in steps of 64: of 127 places 64 are filled, and what fits is not cut.
    prompt = types.ModelInput.from_ints([40] * 897)
    for wanted, given in ((128, 64), (127, 127)):
        asked = types.SamplingParams(max_tokens=wanted, stop=[])
        [found] = sampler.sample(prompt=prompt, num_samples=1, sampling_params=asked).result().sequences
        assert (len(found.tokens), found.stop_reason) == (given, "length")
    with pytest.raises(tinker.RequestFailedError, match="the prompt has 1024 tokens; it must have from 1 to 1023"):
        full = types.ModelInput.from_ints([40] * 1024)
        sampler.sample(prompt=full, num_samples=1, sampling_params=long).result()


def test_a_model_that_is_not_served_is_refused_with_the_way_to_serve_it(client: Any):
    with pytest.raises(tinker.RequestFailedError, match="--alias other/Model=tiny"):
        client.create_lora_training_client(base_model="other/Model").result()
    with pytest.raises(tinker.BadRequestError, match="--alias other/Model=tiny"):
        client.create_sampling_client(base_model="other/Model").result()


def test_requests_sent_again_are_done_once(server: Server, client: Any):
    model = new_model(client)
    model.forward_backward(data(), "cross_entropy").result()
    body = {"model_id": model.model_id, "seq_id": 2, "adam_params": ADAM}
    promises = [server.ask("POST", "/api/v1/optim_step", body)[1]["request_id"] for _ in range(3)]
    assert len(set(promises)) == 1
    answers = [server.ask("POST", "/api/v1/retrieve_future", {"request_id": promises[0]}) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0][1]["metrics"]["grad_norm"] > 1
    assert server.ask("POST", "/api/v1/retrieve_future", {"request_id": "nobody"})[0] == 410


def test_requests_are_done_by_their_number_whatever_their_arrival(server: Server, client: Any):
    texts = {1: [40, 41, 42], 3: [40, 51, 52, 53], 5: [40, 61]}

    def ask(model_id: str, seq_id: int) -> str:
        """For a step (even) or for what it learns from (odd)."""
        if seq_id in texts:
            body, kind = learning(model_id, seq_id, texts[seq_id]), {"Content-Type": "application/x-protobuf"}
            _, told = server.ask("POST", "/api/v1/forward_backward", body, **kind)
        else:
            _, told = server.ask("POST", "/api/v1/optim_step", step(model_id, seq_id, ADAM["learning_rate"]))
        return str(told["request_id"])

    def norms_and_logprobs(*arriving: int) -> list[float]:
        """Norms of the three gradients, and how likely the last text is in the end."""
        model = new_model(client)
        asked = {seq_id: ask(model.model_id, seq_id) for seq_id in arriving}
        norms = []
        for seq_id in (2, 4, 6):
            _, found = server.ask("POST", "/api/v1/retrieve_future", {"request_id": asked[seq_id]})
            norms.append(found["metrics"]["grad_norm"])
        _, saved = server.ask("POST", "/api/v1/save_weights", {"model_id": model.model_id, "seq_id": 7, "path": "end"})
        path = server.ask("POST", "/api/v1/retrieve_future", saved)[1]["path"]
        sampler = client.create_sampling_client(model_path=path).result()
        return [*norms, *sampler.compute_logprobs(types.ModelInput.from_ints([40, 61])).result()[1:]]

    in_order = norms_and_logprobs(1, 2, 3, 4, 5, 6)
    assert norms_and_logprobs(6, 5, 4, 3, 2, 1) == norms_and_logprobs(2, 1, 6, 3, 4, 5) == in_order
    # A step that is done before what it learns from comes has no gradient.
    assert min(in_order[:3]) > 0.01
    # Nor is the order of the steps all one: what was learned last is more likely.
    texts[1], texts[5] = texts[5], texts[1]
    assert norms_and_logprobs(1, 2, 3, 4, 5, 6)[-1] < in_order[-1] - 0.01


def test_what_is_not_offered_is_named(server: Server):
    status, told = server.ask("POST", "/api/v1/create_custom_loss", {})
    assert (status, told["detail"].partition(" is ")[0]) == (404, "POST /api/v1/create_custom_loss")
    status, told = server.ask("POST", "/api/v1/create_model", {"session_id": "x"})
    assert status == 422 and "body.model_seq_id: Field required" in told["detail"]
    status, told = server.ask("POST", "/api/v1/client/config", {"sdk_version": "0.24.1"})
    assert status == 400 and "the client is tinker 0.24.1: pip install 'tinker==0.38.0'" in told["detail"]
    assert server.ask("POST", "/api/v1/session_heartbeat", {"session_id": "nobody"})[0] == 410


def test_a_server_with_a_token_asks_for_it_and_one_without_is_for_this_machine(
    tercet: CommandLine, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert server.ask("GET", "/api/v1/healthz", Host="evil.example")[0] == 403
    assert server.ask("GET", "/api/v1/healthz", Origin="http://localhost")[0] == 403
    refused = tercet("serve", "--model", "tiny", "--host", "0.0.0.0", code=2).err
    assert "a token is required" in refused
    guarded = start(
        tercet, tmp_path, "--host", "0.0.0.0", "--limits.body-mb", 1, "--limits.waiting-samples", 1,
        token="tml-only-for-us",
    )  # fmt: skip
    guarded.url = guarded.url.replace("0.0.0.0", "127.0.0.1")
    assert guarded.ask("GET", "/api/v1/healthz")[0] == 200
    assert guarded.ask("GET", "/api/v1/healthz", **{"X-API-Key": "tml-other"})[0] == 401
    status, told = guarded.ask("POST", "/api/v1/forward_backward", b"x" * 1_000_001)
    assert status == 413 and "larger than 1 MB" in told["detail"]
    with pytest.raises(tinker.AuthenticationError, match="the key is not this server's token"):
        kept(tinker.ServiceClient(base_url=guarded.url, api_key="tml-other")).create_sampling_client("tiny").result()
    # Only one may wait: the SDK is told 429, comes back, and loses none.
    told_so = statuses(monkeypatch)
    client = guarded.client()
    sampler = client.create_sampling_client(base_model="tiny").result()
    params = types.SamplingParams(max_tokens=2)
    asked = [
        sampler.sample(prompt=types.ModelInput.from_ints([40 + i]), num_samples=1, sampling_params=params)
        for i in range(4)
    ]
    assert [len(each.result().sequences[0].tokens) for each in asked] == [2, 2, 2, 2]
    assert ("asample", 429) in told_so
    client.close("success")
    guarded.stop()


def statuses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the SDK is told from here on: endpoint and status."""
    import httpx  # the SDK brings it

    told: list[tuple[str, int]] = []
    send = httpx.AsyncClient.send

    async def seen(self: Any, *args: Any, **settings: Any) -> Any:
        response = await send(self, *args, **settings)
        told.append((response.request.url.path.rpartition("/")[2], response.status_code))
        return response

    monkeypatch.setattr(httpx.AsyncClient, "send", seen)
    return told


def test_a_second_server_of_a_folder_is_refused_and_leaves_what_the_first_one_writes(
    tercet: CommandLine, tmp_path: Path
):
    first = start(tercet, tmp_path)
    writing = tmp_path / "sess-1:train:0" / "weights" / "a.tmp-new"
    writing.mkdir(parents=True)
    told = tercet("serve", "--model", "tiny", "--port", 0, "--out", tmp_path, code=1).err
    assert f"{tmp_path} is in use by process {first.started.pid}" in told
    assert "one server at a time may write checkpoints" in told and "stop it, or choose another --out" in told
    assert writing.is_dir()
    first.stop()
    start(tercet, tmp_path).stop()
    assert not writing.exists()  # now it is what a stopped server left


def test_a_server_with_a_token_may_stand_behind_a_proxy_and_tells_nobody_the_token(tercet: CommandLine, tmp_path: Path):
    assert "token must begin with tml-" in tercet("serve", "--token", "secret-enough", code=2).err
    for key in ("tml-short", "eyJhbGciOiJIUzI1NiJ9"):
        refused = tercet("serve", "--model", "tiny", code=2, environment={"TINKER_API_KEY": key}).err
        assert "TINKER_API_KEY must begin with tml-" in refused
    assert "those that begin with eyJ, which are the hosted service's own" in refused
    guarded = start(tercet, tmp_path, "--token", "tml-only-for-us")
    assert "tml-only" not in guarded.started.out.read_text()
    assert guarded.ask("GET", "/api/v1/healthz", Host="tinker.example")[0] == 401
    guarded.token = "tml-only-for-us"
    assert guarded.ask("GET", "/api/v1/healthz", Host="tinker.example")[0] == 200
    assert guarded.ask("GET", "/api/v1/healthz", Host="tinker.example", Origin="https://tinker.example")[0] == 403
    guarded.stop()


def test_clients_whose_data_must_wait_come_back_and_lose_none(
    tercet: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told_so = statuses(monkeypatch)
    busy = start(tercet, tmp_path, "--limits.waiting-mb", 1)
    client = busy.client()
    model = new_model(client)
    large = [datum([3 + i, *[40] * 99], weights=[0.0] * 98 + [1.0]) for i in range(350)]  # 16 bytes a token: 0.56 MB
    asked = [model.forward_backward(large, "cross_entropy") for _ in range(3)]
    steps = [each.result().metrics["loss:sum"] for each in asked]
    assert steps[0] > 1 and steps == [pytest.approx(steps[0])] * 3
    assert ("forward_backward", 429) in told_so
    client.close("success")
    busy.stop()


def test_many_clients_lose_nothing_and_get_nothing_twice_when_one_of_them_dies_and_memory_stays_flat():
    script = Path(__file__).with_name("load.py")
    command = [sys.executable, str(script), "--clients", "5", "--requests", "150", "--rounds", "4", "--max-rows", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    *rounds, engine = rounds
    assert len(rounds) == 4
    for found in rounds:
        counted = ("asked", "answered", "as_if_alone", "different_samples")
        assert {found[key] for key in counted} == {120}
    # Each was drawn once when alone and once a round, and of what the killed ones asked some were too.
    assert engine["drawn_at_least"] == 600 <= engine["drawn"] <= engine["drawn_at_most"] == 720
    # What a server keeps is counted in tests/unit/server/test_memory.py; this sees what is not Python's, from 60 KB a
    # request. With few rows, for each number of which kernels are kept. It is no number where nobody tells.
    _, second, *_, last = [found["memory_mb_first_most_and_last"][1] for found in rounds]
    assert not last >= second + 15
