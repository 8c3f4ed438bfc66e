"""`tercet serve` in a process of its own, asked by the SDK as it is installed, over a real socket."""

from __future__ import annotations

import io
import math
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tercet.engine.local import LocalEngine
from tercet.models.adapters import read_adapter
from tercet.types import AdamParams, Batch, Datum, LoraConfig, SamplingParams
from tests.e2e.commands import CommandLine
from tests.e2e.serve.serving import (
    ADAM,
    ALIAS,
    ROWS,
    Server,
    data,
    datum,
    kept,
    learned,
    logprobs_of,
    new_model,
    start,
    tinker,
    types,
)

# What the SDK warns of is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_training_gives_the_local_engines_numbers(client: Any, engine: LocalEngine):
    ours = engine.trainer(lora=LoraConfig(rank=8, alpha=32), seed=3)
    batch = Batch([Datum(tokens, [0.0, *weights]) for tokens, weights in ROWS])
    theirs = new_model(client)
    for _ in range(3):
        wanted = ours.forward_backward(batch, "cross_entropy_sum").result()
        stepped = ours.optim_step(AdamParams(**ADAM)).result()
        waiting = theirs.forward_backward(data(), "cross_entropy"), theirs.optim_step(types.AdamParams(**ADAM))
        found, norm = (each.result() for each in waiting)
        assert found.metrics["loss:sum"] == pytest.approx(wanted.loss, abs=1e-5)
        for mine, row in zip(wanted.logprobs, logprobs_of(found), strict=True):
            assert row == pytest.approx(mine[1:], abs=1e-5)
        assert norm.metrics["grad_norm"] == pytest.approx(stepped.grad_norm, abs=1e-4)
    seen = theirs.forward(data(), "cross_entropy").result()
    everywhere = Batch([Datum(tokens, [0.0] + [1.0] * len(weights)) for tokens, weights in ROWS])
    for mine, row in zip(ours.forward(everywhere).result().logprobs, logprobs_of(seen), strict=True):
        assert row == pytest.approx(mine[1:], abs=1e-5)
    weighed = sum(
        w * p for (_, ws), row in zip(ROWS, logprobs_of(seen), strict=True) for w, p in zip(ws, row, strict=True)
    )
    assert seen.metrics["loss:sum"] == pytest.approx(-weighed, abs=1e-4)


def test_sampling_gives_the_local_engines_numbers(client: Any, engine: LocalEngine):
    sampler = client.create_sampling_client(base_model=ALIAS).result()
    prompt = types.ModelInput.from_ints([40, 41, 42])
    for temperature in (1.0, 0.5, 0.0):
        asked = types.SamplingParams(max_tokens=6, temperature=temperature, seed=7)
        found = sampler.sample(prompt=prompt, num_samples=3, sampling_params=asked).result()
        params = SamplingParams(max_tokens=6, temperature=temperature, seed=7)
        [wanted] = engine.sampler().sample([[40, 41, 42]], params, 3).result()
        assert [tuple(each.tokens) for each in found.sequences] == [each.tokens for each in wanted]
        for each, mine in zip(found.sequences, wanted, strict=True):
            assert list(each.logprobs) == pytest.approx(mine.logprobs, abs=1e-5)
    [wanted_row] = engine.sampler().logprobs([[40, 41, 42]]).result()
    first, *rest = sampler.compute_logprobs(prompt).result()
    assert first is None and rest == pytest.approx(wanted_row, abs=1e-5)


def test_every_loss_adds_up_over_tokens(client: Any):
    # Behind an unlikely token the ratio is about exp(p - q); the formulas are those of the protocol's documents.
    tokens, q, advantages = [40, 41, 42, 43], [0.0, -6.0, -6.5], [0.0, 1.5, -0.5]
    rows = [datum(tokens, logprobs=q, advantages=advantages)]
    model = new_model(client)
    [p] = logprobs_of(model.forward(rows, "importance_sampling").result())
    steps = [(p[t], q[t], advantages[t], math.exp(p[t] - q[t])) for t in (1, 2)]
    mean = math.exp(sum(p[t] - q[t] for t in (1, 2)) / 2)
    wanted = {
        ("importance_sampling",): -sum(r * a for _, _, a, r in steps),
        ("ppo", ("clip_low_threshold", 0.9), ("clip_high_threshold", 1.1)): -sum(
            min(r * a, min(max(r, 0.9), 1.1) * a) for _, _, a, r in steps
        ),
        ("cispo", ("clip_low_threshold", 0.95), ("clip_high_threshold", 1.05)): -sum(
            min(max(r, 0.95), 1.05) * new * a for new, _, a, r in steps
        ),
        ("dro", ("beta", 0.2)): -sum(new * a - 0.1 * (new - old) ** 2 for new, old, a, _ in steps),
        ("gspo", ("clip_low_threshold", 0.99), ("clip_high_threshold", 1.01)): -sum(
            min(mean * a, min(max(mean, 0.99), 1.01) * a) for _, _, a, _ in steps
        ),
    }
    masked = [datum(tokens, logprobs=q, advantages=advantages, sequence_ratio_mask=[0.0, 1.0, 1.0])]
    for (loss, *settings), value in wanted.items():
        given = masked if loss == "gspo" else rows
        for ask in (model.forward, model.forward_backward):
            found = ask(given, loss, dict(settings)).result()
            assert found.metrics["loss:sum"] == pytest.approx(value, abs=1e-4), loss
            assert logprobs_of(found)[0][1:] == pytest.approx(p[1:], abs=1e-5)


# -A times this, at the ratios 0.5, 0.9, 1.1, 1.5 and 5; the first is for A = 1, the second for A = -1.
DEFAULTS = {
    "importance_sampling": ((0.5, 0.9, 1.1, 1.5, 5.0), (0.5, 0.9, 1.1, 1.5, 5.0)),
    "ppo": ((0.5, 0.9, 1.1, 1.2, 1.2), (0.8, 0.9, 1.1, 1.5, 5.0)),  # 0.8 to 1.2, and the worse of the two
    "cispo": ((0.5, 0.9, 1.1, 1.5, 4.0), (0.5, 0.9, 1.1, 1.5, 4.0)),  # 0 to 4, times the log-prob
    "gspo": ((0.5, 0.9, 1.1, 1.2, 1.2), (0.8, 0.9, 1.1, 1.5, 5.0)),  # as ppo, of a sequence
    "dro": ((), ()),  # no ratio: the log-prob, less 0.05 / 2 times the squared difference
    "cross_entropy": ((), ()),
}


@pytest.mark.parametrize("loss", DEFAULTS)
def test_a_loss_without_settings_has_those_of_the_protocol(client: Any, loss: str):
    model, tokens, ratios = new_model(client), [40, 41], (0.5, 0.9, 1.1, 1.5, 5.0)
    [[p]] = logprobs_of(model.forward([datum(tokens)], "cross_entropy").result())
    for advantage, factors in zip((1.0, -1.0), DEFAULTS[loss], strict=True):
        # A row a ratio: sequences of one token are their own mean.
        inputs = [{"logprobs": [p - math.log(r)], "advantages": [advantage]} for r in ratios]
        more = {"sequence_ratio_mask": [1.0]} if loss == "gspo" else {}
        rows = [datum(tokens, **each, **more) for each in inputs]
        wanted = -advantage * sum(factors)
        if loss == "cispo":
            wanted *= p
        elif loss == "dro":
            wanted = -sum(p * advantage - 0.5 * 0.05 * math.log(r) ** 2 for r in ratios)
        elif loss == "cross_entropy":
            rows, wanted = [datum(tokens, weights=[0.5]), datum(tokens)], -1.5 * p
        for ask in (model.forward, model.forward_backward):
            assert ask(rows, loss).result().metrics["loss:sum"] == pytest.approx(wanted, abs=1e-4)


def test_a_clients_own_loss_moves_the_weights_as_the_same_loss_here(client: Any):
    def nll(given: list[Any], found: list[Any]) -> tuple[Any, dict[str, float]]:
        import torch

        total = sum(-(torch.tensor(w) * each).sum() for (_, w), each in zip(ROWS, found, strict=True))
        return total, {"own": 1.0}

    own, built_in = new_model(client), new_model(client)
    said = own.forward_backward_custom([datum(tokens) for tokens, _ in ROWS], nll).result().metrics
    wanted = built_in.forward_backward(data(), "cross_entropy").result().metrics["loss:sum"]
    assert (said["own"], said["loss:sum"]) == (1.0, pytest.approx(wanted, abs=1e-4))
    for model in (own, built_in):
        model.optim_step(types.AdamParams(**ADAM)).result()
    rows = [logprobs_of(model.forward(data(), "cross_entropy").result()) for model in (own, built_in)]
    assert [value for row in rows[0] for value in row] == pytest.approx([v for row in rows[1] for v in row], abs=1e-5)


def test_a_target_may_be_another_token_than_the_inputs_next(client: Any):
    model = new_model(client)
    given = types.Datum(
        model_input=types.ModelInput.from_ints([40, 41, 42]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[41, 60, 43], dtype="int64", shape=[3])},
    )
    [found] = logprobs_of(model.forward_backward([given], "cross_entropy").result())
    [beside] = logprobs_of(model.forward([datum([40, 41, 60])], "cross_entropy").result())
    [straight] = logprobs_of(model.forward([datum([40, 41, 42, 43])], "cross_entropy").result())
    assert found == pytest.approx([straight[0], beside[1], straight[2]], abs=1e-5)


def test_pieces_of_a_batch_add_up_to_the_whole(client: Any):
    whole, pieces = new_model(client), new_model(client)
    whole.forward_backward(data(), "cross_entropy")
    for each in data():
        pieces.forward_backward([each], "cross_entropy")
    norms = [model.optim_step(types.AdamParams(**ADAM)).result().metrics["grad_norm"] for model in (whole, pieces)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_sampler_stays_as_it_was_when_training_goes_on(client: Any):
    model = learned(client)
    frozen = model.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([40, 41, 42, 43])
    before = frozen.compute_logprobs(prompt).result()
    model.forward_backward(data(), "cross_entropy")
    model.optim_step(types.AdamParams(**ADAM)).result()
    moved = model.save_weights_and_get_sampling_client().result().compute_logprobs(prompt).result()
    assert frozen.compute_logprobs(prompt).result() == before != moved


def test_a_stop_is_part_of_the_sample_and_an_empty_list_switches_the_end_off(client: Any, engine: LocalEngine):
    sampler = client.create_sampling_client(base_model="tiny").result()
    prompt = types.ModelInput.from_ints([40, 41])

    def draw(**params: Any) -> Any:
        asked = types.SamplingParams(max_tokens=40, seed=1, **params)
        return sampler.sample(prompt=prompt, num_samples=1, sampling_params=asked).result().sequences[0]

    free = list(draw(stop=[]).tokens)
    assert len(free) == 40
    at = free[5]
    stopped = draw(stop=[at])
    assert (list(stopped.tokens), stopped.stop_reason) == (free[: free.index(at) + 1], "stop")
    text = engine.language.decode(free)[2:5]
    worded = list(draw(stop=[text]).tokens)
    assert text in engine.language.decode(worded) and text not in engine.language.decode(worded[:-1])
    assert free[: len(worded)] == worded


def test_the_likeliest_tokens_are_given_for_prompt_and_sample(client: Any):
    sampler = client.create_sampling_client(base_model="tiny").result()
    found = sampler.sample(
        prompt=types.ModelInput.from_ints([40, 41, 42]),
        num_samples=1,
        include_prompt_logprobs=True,
        sampling_params=types.SamplingParams(max_tokens=3, temperature=0),
        topk_prompt_logprobs=4,
        topk_sample_logprobs=2,
    ).result()
    assert found.topk_prompt_logprobs[0] is None
    assert [len(row) for row in found.topk_prompt_logprobs[1:]] == [4, 4]
    [sequence] = found.sequences
    # A greedy sample is the likeliest token each time.
    assert [row[0][0] for row in sequence.topk_logprobs] == list(sequence.tokens)
    assert [row[0][1] for row in sequence.topk_logprobs] == pytest.approx(list(sequence.logprobs), abs=1e-5)


def test_going_on_from_a_state_equals_never_having_stopped(client: Any):
    model = learned(client)
    saved = model.save_state("here").result().path
    again = client.create_training_client_from_state_with_optimizer(saved).result()
    fresh = client.create_training_client_from_state(saved).result()
    for each in (model, again, fresh):
        for _ in range(2):
            each.forward_backward(data(), "cross_entropy")
            each.optim_step(types.AdamParams(**ADAM)).result()
    rows = [logprobs_of(each.forward(data(), "cross_entropy").result()) for each in (model, again, fresh)]
    assert rows[0] == rows[1] != rows[2]


def test_a_model_takes_over_a_state_in_place(client: Any):
    model = learned(client)
    saved = model.save_state("taken-over").result().path
    plain, whole = new_model(client), learned(client, 1)
    assert plain.load_state(saved).result().path == saved
    whole.load_state_with_optimizer(saved).result()
    rows = [logprobs_of(each.forward(data(), "cross_entropy").result()) for each in (model, whole, plain)]
    assert rows[0] == rows[1] == rows[2]
    for each in (model, whole, plain):
        for _ in range(2):
            each.forward_backward(data(), "cross_entropy")
            each.optim_step(types.AdamParams(**ADAM)).result()
    rows = [logprobs_of(each.forward(data(), "cross_entropy").result()) for each in (model, whole, plain)]
    assert rows[0] == rows[1] != rows[2]


def test_a_checkpoint_outlives_its_session_and_the_server(tercet: CommandLine, tmp_path: Path):
    first = start(tercet, tmp_path)
    client = first.client()
    model = learned(client)
    state = model.save_state("end").result().path
    weights = model.save_weights_for_sampler("end").result().path
    prompt = types.ModelInput.from_ints([40, 41, 42, 43])
    wanted = client.create_sampling_client(model_path=weights).result().compute_logprobs(prompt).result()
    rows = logprobs_of(model.forward(data(), "cross_entropy").result())
    client.close("success")
    first.stop()
    second = start(tercet, tmp_path)
    client = second.client()
    assert client.create_sampling_client(model_path=weights).result().compute_logprobs(prompt).result() == wanted
    again = client.create_training_client_from_state_with_optimizer(state).result()
    assert logprobs_of(again.forward(data(), "cross_entropy").result()) == rows
    run = second.rest().get_training_run(model.model_id).result()
    assert (run.base_model, run.lora_rank, run.last_checkpoint.tinker_path) == ("tiny", 8, state)
    status, told = second.ask(
        "POST", "/api/v1/optim_step", {"model_id": model.model_id, "seq_id": 9, "adam_params": ADAM}
    )
    assert status == 404 and "create a training client from its last checkpoint" in told["detail"]
    client.close("success")
    second.stop()


def test_checkpoints_are_listed_described_packed_and_deleted(server: Server, client: Any, tmp_path: Path):
    model = new_model(client, user_metadata={"renderer_name": "role_colon"})
    path = model.save_state("000010", ttl_seconds=7200).result().path
    assert path == f"tinker://{model.model_id}/weights/000010"
    rest = server.rest()
    [listed] = rest.list_checkpoints(model.model_id).result().checkpoints
    assert (listed.checkpoint_id, listed.checkpoint_type) == ("weights/000010", "training")
    assert listed.expires_at is not None and listed.size_bytes > 10_000
    assert rest.get_training_run(model.model_id).result().user_metadata == {"renderer_name": "role_colon"}
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == ("tiny", True, 8)
    status, packed = server.ask("GET", f"/api/v1/training_runs/{model.model_id}/checkpoints/weights/000010/archive")
    assert status == 200
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(tmp_path, filter="data")
    assert read_adapter(tmp_path)[0].rank == 8
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(model.model_id).result().checkpoints == []
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        client.create_sampling_client(model_path=path).result()


def test_what_one_client_notes_breaks_nobodys_lists(server: Server):
    noted = kept(tinker.ServiceClient(base_url=server.url, api_key=server.token, user_metadata={"try": 3}))
    model = new_model(noted, user_metadata={"seed": 3, "tags": ["a", "b"]})
    path = model.save_state("noted", user_metadata={"who": "me"}).result().path
    body = {"model_id": model.model_id, "seq_id": 2, "path": "odd", "user_metadata": {"step": 10}}
    asked = server.ask("POST", "/api/v1/save_weights", body)[1]["request_id"]
    assert "path" in server.ask("POST", "/api/v1/retrieve_future", {"request_id": asked})[1]
    rest, session = server.rest(), model.model_id.partition(":")[0]
    [run] = [each for each in rest.list_training_runs().result().training_runs if each.base_model == "tiny"][:1]
    assert (run.training_run_id, run.user_metadata) == (model.model_id, {"seed": "3", "tags": '["a", "b"]'})
    odd, plain = rest.list_user_checkpoints().result().checkpoints[:2]
    assert (odd.user_metadata, plain.user_metadata) == ({"step": "10"}, {"who": "me"})
    assert session in rest.list_sessions().result().sessions
    told = rest.get_session(session).result()
    assert (told.training_run_ids, told.user_metadata) == ([model.model_id], {"try": "3"})
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    assert rest.list_user_checkpoints().result().checkpoints[1].expires_at > plain.time
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert rest.list_user_checkpoints().result().checkpoints[1].expires_at is None
    with pytest.raises(tinker.BadRequestError, match="it must be from 0 to 315360000"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 10**12).result()
    noted.close("success")


def test_the_tokenizer_comes_from_the_servers_own_directory(client: Any, engine: LocalEngine):
    tokenizer = client.create_lora_training_client(base_model=ALIAS, rank=4).result().get_tokenizer()
    text = "Which of the two is better?"
    assert tokenizer.encode(text) == engine.loaded.tokenizer.encode(text)


def test_two_clients_at_once_do_not_meet(server: Server, client: Any):
    def run(seen: list[Any], own: Any) -> None:
        model = learned(own, 3)
        seen += logprobs_of(model.forward(data(), "cross_entropy").result())

    other = server.client()
    found: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(found, (client, other), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close("success")
    assert found[0] == found[1] and len(found[0]) == 2
