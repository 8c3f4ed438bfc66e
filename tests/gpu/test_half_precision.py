"""Logits and attention scores of half precision are float32 on a GPU.

Without one the same code computes on a CPU, where the products that torch has on CUDA alone are computed here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.library import _scoped_library

from tercet.engine.collate import forest
from tercet.engine.kv_cache import Decode, KeyValueCache
from tercet.engine.outputs import span_layout
from tercet.models import widening
from tercet.models.logprobs import logits_of, token_logprobs

HALVES = [torch.bfloat16, torch.float16]
# A few roundings, of 8 and of 11 bits, of the largest number.
LIMIT = {torch.bfloat16: 0.01, torch.float16: 0.001}
CUDA = torch.device("cuda")
needs_gpu = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", needs_gpu])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where products of half precision come out in float32."""
    place = torch.device(request.param)
    if place.type == "cuda":
        yield place
        return

    def product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
        return torch.matmul(a.to(kind), b.to(kind))

    monkeypatch.setattr(widening, "WIDENS", {"cpu", "cuda"})
    with _scoped_library("aten", "IMPL") as library:
        for name in ("mm", "bmm"):
            library.impl(f"{name}.dtype", product, "CPU")
        yield place


def head_of(half: torch.dtype, place: torch.device, bias: bool) -> tuple[nn.Linear, Tensor]:
    """A head, and hidden states of which it makes logits up to about 20."""
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(64, 500, bias=bias, device=place, dtype=half).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return head, (0.7 * torch.randn(40, 64, generator=draw)).to(place, half)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_a_half_precision_head_are_those_of_float32(
    place: torch.device, half: torch.dtype, bias: bool
) -> None:
    head, hidden = head_of(half, place, bias)
    expected = nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double() if bias else None)
    with torch.no_grad():
        found = logits_of(head, CUDA)(hidden)
    assert expected.abs().max() > 15
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("learns", ["nothing", "trunk", "head"])
def test_logprobs_and_gradients_of_a_half_precision_head_on_a_gpu_are_those_of_a_cpu(
    half: torch.dtype, learns: str
) -> None:
    found = []
    for place in (CUDA, torch.device("cpu")):
        head, hidden = head_of(half, place, bias=True)
        # On a CPU the same numbers in float32.
        head, hidden = (head, hidden) if place.type == "cuda" else (head.float(), hidden.float())
        head.requires_grad_(learns == "head")
        hidden.requires_grad_(learns == "trunk")
        targets = torch.arange(len(hidden), device=place)
        logprobs, entropy = token_logprobs(hidden, targets, head, 0.7)
        assert entropy.isfinite().all()
        if learns != "nothing":
            logprobs.sum().backward()  # type: ignore[no-untyped-call]
        gradients = [x.grad.double().cpu() for x in (hidden, *head.parameters()) if x.grad is not None]
        found.append((logprobs.detach().cpu(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert len(our_gradients) == len(their_gradients) == {"nothing": 0, "trunk": 1, "head": 2}[learns]
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize("half", HALVES)
def test_a_half_precision_head_that_learns_has_float32_logits_too(half: torch.dtype) -> None:
    head, hidden = head_of(half, torch.device("cpu"), bias=True)
    head.requires_grad_(True)
    logits = logits_of(head, CUDA)(hidden)
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    expected = nn.functional.linear(hidden.double(), weight, bias)
    torch.testing.assert_close(logits.detach().double(), expected, rtol=0, atol=1e-4)
    logits.pow(2).sum().backward()  # type: ignore[no-untyped-call]
    wanted = (2 * expected).T @ hidden.double()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == half
    assert float((head.weight.grad.double() - wanted).norm() / wanted.norm()) < 0.01


def off(found: Tensor, wanted: Tensor) -> float:
    """How far, of the largest number there is."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def drawn(place: torch.device, half: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw).to(place, half) for shape in shapes]


@pytest.mark.parametrize("half", HALVES)
def test_spans_in_half_precision_attend_by_float32_scores(place: torch.device, half: torch.dtype) -> None:
    packed = forest([[1] * 40 + [i] * 30 for i in range(2, 6)])
    n = len(packed.tokens)
    given = drawn(place, half, (4, n, 16), (2, n, 16), (2, n, 16), (4, n, 16))
    given[:2] = [2.5 * x for x in given[:2]]
    layout = span_layout(packed, place)

    def computed(query: Tensor, key: Tensor, value: Tensor, into: Tensor) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        # A score is up to about 30.
        out = layout.attend(0, q, k, v, 0.25)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), into)]

    found, wanted = computed(*given), computed(*(x.double() for x in given))
    assert [x.dtype for x in found] == [half] * 4
    assert all(off(a, b) < LIMIT[half] for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("half", HALVES)
def test_decoding_in_half_precision_attends_by_float32_scores(place: torch.device, half: torch.dtype) -> None:
    def decoded(kind: torch.dtype) -> Tensor:
        cache = KeyValueCache(6, 40, place)
        cache.add([50, 20], [[0, 1, 2], [3, 4]])
        keys = drawn(place, half, *((len(b.rows), 2, b.tokens, 16) for b in cache.blocks), (6, 2, 32, 16), (2, 5, 16))
        values = drawn(place, half, *(x.shape for x in keys))
        for block, k, v in zip(cache.blocks, keys, values, strict=False):
            block.keys.append((2.5 * k).to(kind))
            block.values.append((v + 1).to(kind))
        own = cache.store(0, keys[-1].to(kind), values[-1].to(kind), 32)
        own[0][:6], own[1][:6] = 2.5 * keys[-2].to(kind), values[-2].to(kind)
        query = 2.5 * drawn(place, half, (4, 5, 16))[0].to(kind)
        layout = Decode.of(cache, np.array([9, 3, 12, 1, 30]))
        return layout.attend(0, query, keys[-1].to(kind), values[-1].to(kind), 0.25)

    found = decoded(half)
    assert found.dtype == half
    assert off(found, decoded(torch.float64)) < LIMIT[half]
