"""Decode steps with frozen shapes and addresses, as a CUDA graph has them; here what is recorded is done again."""

from __future__ import annotations

import pytest
import torch

from tercet.engine import graphed, sampler
from tercet.engine.kv_cache import KeyValueCache
from tercet.engine.local import LocalEngine
from tercet.errors import EngineError
from tercet.models.load import load_model
from tercet.types import SamplingParams

PROMPTS = [[3, 4, 5], [6], list(range(7, 60)), [9, 9], [60, 61, 62, 63]]


class Records:
    """Does what was recorded again, as long as every tensor of the cache lies where it lay."""

    def __init__(self) -> None:
        self.caches: list[KeyValueCache] = []
        self.recorded = self.replayed = 0

    def addresses(self) -> list[int]:
        cache = self.caches[-1]
        slots = cache.slots(cache.keys[0].shape[1])
        held = [*cache.keys, *cache.values, slots.read, slots.write, slots.inverse]
        for block in cache.blocks:
            held += [*block.keys, *block.values, *([] if block.bias is None else [block.bias])]
        return [tensor.data_ptr() for tensor in held]

    def record(self, work):
        out, before = work().clone(), self.addresses()
        self.recorded += 1

        def again() -> None:
            assert self.addresses() == before
            out.copy_(work())
            self.replayed += 1

        return again, out


@pytest.fixture
def records(monkeypatch) -> Records:
    found = Records()

    class Kept(KeyValueCache):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            found.caches.append(self)

    monkeypatch.setattr(sampler, "KeyValueCache", Kept)
    monkeypatch.setattr(graphed, "_FAILED", [])
    return found


def drawn(max_tokens: int, *, rows: int = 128, stop: tuple[int, ...] = ()):
    engine = LocalEngine(load_model("tiny"), max_rows=rows)
    params = SamplingParams(max_tokens=max_tokens, eos=False, seed=3, stop=stop)
    groups = engine.sampler().sample(PROMPTS, params, n=4).result()
    return [completion for group in groups for completion in group]


# A fifth of the vocabulary ends a row, so that rows leave at nearly every step and others take their places.
ENDS = tuple(range(0, 400, 20))


@pytest.mark.parametrize(("max_tokens", "rows", "stop"), [(70, 128, ()), (40, 128, ENDS), (40, 7, ENDS), (2, 128, ())])
def test_recorded_steps_draw_what_others_draw(records, monkeypatch, max_tokens, rows, stop):
    expected = drawn(max_tokens, rows=rows, stop=stop)
    monkeypatch.setattr(sampler, "recorder", lambda device: records.record)
    found = drawn(max_tokens, rows=rows, stop=stop)
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    steps = max(len(completion.tokens) for completion in found) - 1
    assert (records.recorded > 0) == (steps > graphed.STEPS_BEFORE)


def test_a_graph_is_recorded_for_every_room_and_serves_until_it_changes(records, monkeypatch):
    monkeypatch.setattr(sampler, "recorder", lambda device: records.record)
    drawn(70)
    # 69 steps in rooms of 32, 64 and 70 tokens; three steps of each come before the graph, which is then used once more
    # than there are steps left, to be checked.
    assert records.recorded == 3
    assert records.replayed == 69 - 3 * (graphed.STEPS_BEFORE - 1)


@pytest.mark.parametrize("fault", ["other numbers", "by nan of the largest", "cannot be recorded"])
def test_a_graph_that_does_not_work_is_named_once_and_not_tried_again(records, monkeypatch, fault):
    tried = []

    def bad(work):
        tried.append(fault)
        if fault == "cannot be recorded":
            raise RuntimeError("operation not permitted when stream is capturing")
        out = work().clone()
        kept = out.clone()
        # A replay that does nothing is what a capture of another device's work is.
        return (lambda: None if "nan" in fault else out.copy_(1.5 * kept)), out

    expected = drawn(12)
    monkeypatch.setattr(sampler, "recorder", lambda device: bad)
    with pytest.warns(UserWarning, match=fault) as told:
        found = drawn(12)
    assert len(told) == len(tried) == 1
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    assert drawn(12) and len(tried) == 1
    assert graphed.recorder(torch.device("cuda")) is None


def test_there_are_graphs_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(graphed, "_FAILED", [])
    assert graphed.recorder(torch.device("cpu")) is None
    assert graphed.recorder(torch.device("cuda")) is not None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
    ids=["torch", "cublas"],
)
def test_memory_that_runs_out_while_recording_is_no_reason_to_do_without(records, monkeypatch, error):
    def full(work):
        raise error

    monkeypatch.setattr(sampler, "recorder", lambda device: full)
    with pytest.raises(EngineError, match="memory ran out"):
        drawn(12)
    assert not graphed.given_up()


def test_a_block_of_prompts_is_never_taken_for_one_that_is_gone():
    cache = KeyValueCache(2, 4, torch.device("cpu"))
    seen = set()
    for _ in range(50):  # the next block is often given the address of the last
        cache.add([3], [[0, 1]])
        assert cache.shape not in seen
        seen.add(cache.shape)
        cache.close([0, 1], [], 0)


def test_on_cuda_a_block_has_prompts_of_less_like_length():
    cache = KeyValueCache(5, 4, torch.device("cpu"))
    cache.spread = KeyValueCache(5, 4, torch.device("cuda")).spread
    # 96 is 4 x 20 + 16, and 404 is 4 x 97 + 16.
    assert cache.add([404, 97, 20, 405, 96], [[i] for i in range(5)]) == [[2, 4], [1, 0], [3]]
