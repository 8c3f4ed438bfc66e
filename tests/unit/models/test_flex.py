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


def test_short_rows_without_gradient_are_tried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    flex.works.cache_clear()
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    monkeypatch.setattr(flex, "error_of", lambda *given: 0.5 if given[6:] == (13,) else 0.01)
    with pytest.warns(UserWarning, match=r"is off here, by 0.01 and 0.5 of the largest"):
        assert not flex.works(6, 2, 16, torch.bfloat16, CPU)
    flex.works.cache_clear()
