"""A decode step as a CUDA graph: one call starts its thousands of small kernels.

A graph has fixed shapes and addresses. So all rows there may be take part, those that have ended for nothing; own
tokens are looked at as far as there is room for them; and where rows lie is written into the same tensors when some of
them leave. When rooms or prompts change a new graph is recorded, once it is seen that they stay for some steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tercet.engine.collate import IntArray
from tercet.engine.kv_cache import Decode, KeyValueCache
from tercet.models.tree_attention import Layout

# Recording costs about as much as so many steps.
STEPS_BEFORE = 3
# How far a graph's hidden states may be off those of the step it was recorded from, of the largest number.
TOLERANCE = 0.02

Work = Callable[[], Tensor]
Recorder = Callable[[Work], tuple[Callable[[], object], Tensor]]
"""Records work: what does it again, and the tensor in which its result then is."""


def recorder(device: torch.device) -> Recorder | None:
    """What records graphs on a device; None where there are none, or where one has failed."""
    return cuda_graph if device.type == "cuda" and not _FAILED else None


_FAILED: list[str] = []


def cuda_graph(work: Work) -> tuple[Callable[[], object], Tensor]:
    """Record what work does on the current CUDA device. It runs once before, so that libraries have made ready."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph.replay, out


class GraphedStep:
    """Hidden states of one more token of every row."""

    def __init__(
        self, hidden: Callable[[Tensor, Tensor, Layout], Tensor], cache: KeyValueCache, record: Recorder
    ) -> None:
        """Take over what is called.

        Args:
            hidden: Tokens (R,), positions (R,) and layout -> hidden states (R, D).
            cache: Of the rows.
            record: See `recorder`.
        """
        self.hidden, self.cache, self.record = hidden, cache, record
        self.tokens, self.positions, self.own = (
            torch.zeros(cache.rows, dtype=torch.long, device=cache.device) for _ in range(3)
        )
        self.shape: object = None
        self.steps = 0
        self.replay: Callable[[], object] | None = None
        self.out: Tensor | None = None

    def __call__(self, tokens: IntArray, positions: IntArray, own: IntArray) -> Tensor:
        """Hidden states (n, D) of the newest tokens of the n rows there are.

        Args:
            tokens: (n,) ids.
            positions: (n,) of each in its sequence.
            own: (n,) tokens of each row that are already kept.
        """
        n, room = len(tokens), self.cache.room(int(own.max()) + 1)
        for held, now in ((self.tokens, tokens), (self.positions, positions), (self.own, own)):
            held.copy_(torch.from_numpy(np.pad(now, (0, len(held) - n))))
        self.cache.note_slots()
        shape = (room, self.cache.shape)
        if shape != self.shape:
            self.shape, self.steps, self.replay, self.out = shape, 0, None, None
        self.steps += 1
        if self.replay is None and self.steps > STEPS_BEFORE and self.record_with(room, n):
            assert self.out is not None
            return self.out[:n]
        if self.replay is None or self.out is None:
            return self.work(room)[:n]
        self.replay()
        return self.out[:n]

    def work(self, room: int) -> Tensor:
        """The step, with all shapes as they are recorded."""
        return self.hidden(self.tokens, self.positions, Decode(self.cache, self.own, room))

    def record_with(self, room: int, n: int) -> bool:
        """Record the step and do it; whether that gave what it gives without. If not, that is said, once a process."""
        if _FAILED:
            return False
        wanted = self.work(room)[:n]
        try:
            self.replay, self.out = self.record(lambda: self.work(room))
            self.replay()
            apart = float((self.out[:n] - wanted).abs().max() / wanted.abs().max())
        except Exception as error:  # the driver and every library under it raise whatever they like
            found = f"cannot be recorded here: {error}"
        else:
            if apart <= TOLERANCE:
                return True
            found = f"gives other numbers here, by {apart:.2g} of the largest"
        _FAILED.append(found)
        self.replay = self.out = None
        warnings.warn(f"a decode step as a CUDA graph {found}; steps are computed kernel by kernel", stacklevel=2)
        return False
