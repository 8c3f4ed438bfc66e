"""A decode step as a CUDA graph: one call starts its thousands of small kernels.

A graph has fixed shapes and addresses. So all rows there may be take part, those that have ended for nothing; own
tokens are looked at as far as there is room for them; and where rows lie is written into the same tensors when some of
them leave. When rooms or prompts change a new graph is recorded, once it is seen that they stay for some steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tercet.engine.collate import IntArray
from tercet.engine.kv_cache import Decode, KeyValueCache
from tercet.models.out_of_memory import ran_out
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
    return partial(cuda_graph, device) if device.type == "cuda" and not _FAILED else None


_FAILED: list[str] = []


def given_up() -> bool:
    """Whether graphs were tried in this process and did not work."""
    return bool(_FAILED)


def cuda_graph(device: torch.device, work: Work) -> tuple[Callable[[], object], Tensor]:
    """Record what work does on a CUDA device. It runs once before, so that libraries have made ready."""
    # A stream, a capture and a replay belong to the current device, whatever device tensors are on.
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, out


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
        self.recorded: tuple[Callable[[], object], Tensor] | None = None

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
            self.shape, self.steps, self.recorded = shape, 0, None
        self.steps += 1
        if self.recorded is None and self.steps > STEPS_BEFORE:
            self.recorded = self.tried(room, n)
        if self.recorded is None:
            return self.work(room)[:n]
        replay, out = self.recorded
        replay()
        return out[:n]

    def work(self, room: int) -> Tensor:
        """The step, with all shapes as they are recorded."""
        return self.hidden(self.tokens, self.positions, Decode(self.cache, self.own, room))

    def tried(self, room: int, n: int) -> tuple[Callable[[], object], Tensor] | None:
        """The step recorded; None where it does not give what it gives without. That is said, once a process."""
        if _FAILED:
            return None
        wanted = self.work(room)[:n]
        try:
            replay, out = self.record(lambda: self.work(room))
            # What was there must not be taken for what it gives.
            out.fill_(float("nan"))
            replay()
            apart = float((out[:n] - wanted).abs().max() / wanted.abs().max())
        except Exception as error:  # the driver and every library under it raise whatever they like
            if ran_out(error):
                raise  # fewer rows are tried, with graphs
            found = f"cannot be recorded here: {error}"
        else:
            if apart <= TOLERANCE:
                return replay, out
            found = f"gives other numbers here, by {apart:.2g} of the largest"
        _FAILED.append(found)
        warnings.warn(f"a decode step as a CUDA graph {found}; steps are computed kernel by kernel", stacklevel=2)
        return None
