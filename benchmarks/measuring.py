"""How things are timed: what a benchmark is made of, and the process in which one side of it runs.

Every side of a row runs in a process of its own, so that its peak memory is its own. The processes take turns, one run
each, and sleep in between; so both sides meet the same machine.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
GEMM = 2048


@dataclass(frozen=True)
class Work:
    """What all sides of a row are given; see `work.py`."""

    model: str
    smoke: bool
    settings: dict[str, Any]
    groups: list[dict[str, Any]]
    prompts: list[list[int]]
    pairs: list[dict[str, str]]
    texts: list[str]


@dataclass(frozen=True)
class Run:
    """One timed run. Tokens are the task's, whatever a side computes for them; `same` must agree between sides."""

    seconds: float
    tokens: int
    flops: float = 0.0
    same: Mapping[str, float] = field(default_factory=dict)


Once = Callable[[], Run]
Side = Callable[[Work], Once]


@dataclass(frozen=True)
class Row:
    """A line of the table: the first side is ours; `target` is how many times faster (or smaller) it shall be."""

    name: str
    what: str
    sides: Mapping[str, Side]
    target: float
    of: str = "seconds"
    """seconds or rss_mb: how much less of it; arithmetic: share of the GEMM peak; slope: log seconds over log size."""
    tolerance: float = 1e-4
    """By how much, relative to their size, the numbers in `same` may differ."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """For some of them another one."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the wall clock, and what came out."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def gemm_gflops() -> float:
    """The best of three products of square float32 matrices, by each of torch's two libraries: what the machine can do
    just now."""
    import torch

    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    products = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return max(2 * GEMM**3 / timed(product)[0] / 1e9 for product in products for _ in range(3))


class SideHere:
    """One side of a row in this process, ready to run: quick, but its memory is not its own."""

    def __init__(self, row: Row, side: str, work: Work) -> None:
        self.side, self.smoke = side, work.smoke
        self.runs: list[dict[str, Any]] = []
        self.once = row.sides[side](work)

    def run(self) -> dict[str, Any]:
        """One run; what it took."""
        self.runs.append(measured(self.once, self.smoke))
        return self.runs[-1]

    def close(self) -> None:
        """Nothing is open."""

    def summary(self) -> dict[str, Any]:
        """See `summary`."""
        return summary(self.runs)


class SideProcess:
    """One side of a row in a process of its own, ready to run when it is told, and stopped while it is not its turn."""

    def __init__(self, python: str, row: str, side: str, work: Path, threads: int) -> None:
        self.side = side
        self.runs: list[dict[str, Any]] = []
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "TRL_EXPERIMENTAL_SILENCE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        command = [python, str(HERE / "side.py"), row, side, str(work)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def run(self) -> dict[str, Any]:
        """One run; what it took."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        self.runs.append(self._answer())
        self.process.send_signal(signal.SIGSTOP)
        return self.runs[-1]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def summary(self) -> dict[str, Any]:
        """See `summary`."""
        return summary(self.runs)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"the side {self.side} ended with exit code {self.process.wait()}; its errors stand above")


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and the largest memory the process ever had."""
    gflops = [run["flops"] / run["seconds"] / 1e9 for run in runs]
    return {
        "seconds": [run["seconds"] for run in runs],
        "median_seconds": median(run["seconds"] for run in runs),
        "tokens": runs[-1]["tokens"],
        "tokens_per_s": median(run["tokens"] / run["seconds"] for run in runs),
        "rss_mb": runs[-1]["rss_mb"],
        "gflops": median(gflops) or None,
        "gemm_gflops": median(run["gemm_gflops"] for run in runs),
        "arithmetic": median(rate / run["gemm_gflops"] for rate, run in zip(gflops, runs, strict=True)) or None,
        "same": runs[-1]["same"],
    }


def measured(once: Once, smoke: bool) -> dict[str, Any]:
    """One run, with what the machine could do right before it and the most memory the process has had."""
    gemm = gemm_gflops() if not smoke else 1.0
    run = asdict(once())
    odd = {name: value for name, value in run["same"].items() if not isfinite(value)}
    if odd:
        raise SystemExit(f"a run gave {odd}; what is not finite was computed wrongly and says nothing of speed")
    return {**run, "gemm_gflops": gemm, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def serve(side: Side, work: Work, *, warm_up: bool) -> None:
    """In a side's process: get ready, then run whenever a line comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where errors go
    once = side(work)
    if warm_up:
        once()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measured(once, work.smoke)), file=answers, flush=True)


def disagreement(sides: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each number that both sides give, how far they are apart relative to its size."""
    first, *others = sides
    return {
        name: max(abs(other[name] - value) / max(abs(value), 1e-9) for other in others if name in other)
        for name, value in first.items()
        if any(name in other for other in others)
    }
