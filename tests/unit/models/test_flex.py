"""FlexAttention's masks without a GPU, where torch computes them uncompiled and forward only."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from tercet.engine.collate import forest
from tercet.engine.outputs import span_layout
from tercet.models import flex

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def inputs(tokens: int, heads: int = 6, kv_heads: int = 2, d: int = 16) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return [torch.randn(n, tokens, d, generator=draw) for n in (heads, kv_heads, kv_heads)]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 12))
def test_the_kernel_gives_what_spans_give(rows: list[list[int]], times: int) -> None:
    packed = forest([row * times for row in rows])
    query, key, value = inputs(len(packed.tokens))
    mask = flex.block_mask(torch.from_numpy(packed.subtree_end))
    with torch.no_grad():
        found = flex.fused(flex_attention, query, key, value, mask, 0.3)
        wanted = span_layout(packed, CPU).attend(0, query, key, value, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_blocks_that_see_nothing_are_skipped() -> None:
    packed = forest([[1] * 256, [2] * 256])
    mask = flex.block_mask(torch.from_numpy(packed.subtree_end))
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(1, 40))
def test_blocks_are_those_in_which_something_is_seen_and_full_ones_those_in_which_all_is(
    rows: list[list[int]], times: int
) -> None:
    packed = forest([row * times for row in rows])
    mask = flex.block_mask(torch.from_numpy(packed.subtree_end))
    tokens, size = len(packed.tokens), 128
    row, ends = torch.arange(tokens), torch.from_numpy(packed.subtree_end)
    n = -(-tokens // size)
    sees = torch.zeros(n * size, n * size, dtype=torch.bool)  # a block that reaches beyond the end is never full
    sees[:tokens, :tokens] = (row[None] <= row[:, None]) & (row[:, None] < ends[None])
    blocks = sees.reshape(n, size, n, size).transpose(1, 2).flatten(2)
    for wanted, places in (
        (blocks.all(-1), listed(mask.full_kv_num_blocks, mask.full_kv_indices)),
        (blocks.any(-1) & ~blocks.all(-1), listed(mask.kv_num_blocks, mask.kv_indices)),
        (blocks.all(-1).T, listed(mask.full_q_num_blocks, mask.full_q_indices)),
        ((blocks.any(-1) & ~blocks.all(-1)).T, listed(mask.q_num_blocks, mask.q_indices)),
    ):
        assert places == [line.nonzero()[:, 0].tolist() for line in wanted]


def listed(numbers: torch.Tensor | None, indices: torch.Tensor | None) -> list[list[int]]:
    """The blocks that a mask lists for each line of them; of its indices the first so many count."""
    assert numbers is not None and indices is not None
    return [sorted(line[:n].tolist()) for line, n in zip(indices[0, 0], numbers[0, 0].tolist(), strict=True)]


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> flex.FlexLayout:
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    packed = forest([[1, 2, 3], [1, 2, 4]])
    return flex.FlexLayout(torch.from_numpy(packed.subtree_end), lambda: span_layout(packed, CPU))


@pytest.mark.parametrize("works", [True, False])
def test_a_layout_attends_either_way(layout: flex.FlexLayout, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "works", lambda *_: works)
    with torch.no_grad():
        found = layout.attend(0, *inputs(4), 0.25)
    wanted = layout.spans().attend(0, *inputs(4), 0.25)
    torch.testing.assert_close(found, wanted)
    assert ("mask" in vars(layout)) == works


def test_a_kernel_that_cannot_be_compiled_is_not_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    flex.works.cache_clear()
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)

    def broken(*_: object) -> float:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(flex, "error_of", broken)
    with pytest.warns(UserWarning, match="FlexAttention fails here: no Triton; attention is computed span by span"):
        assert not flex.works(6, 2, 16, torch.bfloat16, CPU)
    assert not flex.works(6, 2, 16, torch.bfloat16, CPU)  # tried and said once
    flex.works.cache_clear()


@pytest.mark.parametrize("error, works", [(0.01, True), (0.2, False), (float("nan"), False)])
def test_a_kernel_that_is_off_is_not_used(error: float, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flex.works.cache_clear()
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    monkeypatch.setattr(flex, "error_of", lambda *_: error)
    if works:
        assert flex.works(6, 2, 16, torch.bfloat16, CPU)
    else:
        with pytest.warns(UserWarning, match="FlexAttention is off here"):
            assert not flex.works(6, 2, 16, torch.bfloat16, CPU)
    flex.works.cache_clear()


def test_the_trial_measures_how_far_a_kernel_is_off() -> None:
    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
        """The masked softmax of the trial's own trie, which has gradients on a CPU."""
        n = query.shape[2] // 3
        ends = torch.tensor([3 * n] * n + [2 * n] * n + [3 * n] * n)
        return flex._masked_softmax(query[0], key[0], value[0], ends, 0.25)[None]

    assert flex.error_of(dense, 6, 2, 16, torch.float32, CPU) < 1e-5
    assert flex.error_of(lambda *a, **k: 1.1 * dense(*a, **k), 6, 2, 16, torch.float32, CPU) > 0.05
    with torch.inference_mode():
        assert flex.error_of(dense, 6, 2, 16, torch.float32, CPU, 13) < 1e-5
    assert math.isnan(flex.error_of(lambda *a, **k: math.nan * dense(*a, **k), 6, 2, 16, torch.float32, CPU))


@pytest.mark.parametrize("gradient, said", [(True, "0.01 and 0.5 and 0.01"), (False, "0.01 and 0.01 and 0.5")])
def test_short_rows_are_tried_with_and_without_gradient(
    monkeypatch: pytest.MonkeyPatch, gradient: bool, said: str
) -> None:
    flex.works.cache_clear()
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    bad = (13, gradient)
    monkeypatch.setattr(flex, "error_of", lambda *given: 0.5 if (given[6], torch.is_grad_enabled()) == bad else 0.01)
    with pytest.warns(UserWarning, match=f"is off here, by {said} of the largest"):
        assert not flex.works(6, 2, 16, torch.bfloat16, CPU)
    flex.works.cache_clear()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=["torch", "triton"],
)
def test_memory_that_runs_out_in_the_trial_is_passed_on_and_the_kernel_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    flex.works.cache_clear()
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)

    def full(*_: object) -> float:
        raise error

    monkeypatch.setattr(flex, "error_of", full)
    with pytest.raises(type(error), match="out of memory"):
        flex.works(6, 2, 16, torch.bfloat16, CPU)
    monkeypatch.setattr(flex, "error_of", lambda *_: 0.01)
    assert flex.works(6, 2, 16, torch.bfloat16, CPU)
    flex.works.cache_clear()
