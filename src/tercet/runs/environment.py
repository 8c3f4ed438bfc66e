"""Facts about the machine and the libraries, for a run's record, its report, and `tercet doctor`. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tercet
from tercet.machine import memory_bytes

LIBRARIES = (
    "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "tyro", "PyYAML", "rich",
    "matplotlib", "tensorboard", "vllm", "ray", "wandb", "trackio",
)  # fmt: skip

VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
"""Environment variables that change what a run does or how fast. None of them can hold a secret."""


def environment() -> dict[str, Any]:
    """What a run ran on.

    `cpus` counts those this process may use, `cores` the physical ones among them, whole: its affinity and its
    container's quota are respected, as is the container's limit in `memory_gib`. `torch_threads` and `gpus` are None
    while torch is not imported.
    Nothing here says who or where: no host name, user, path or address.
    """
    return {
        "tercet": tercet.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": _usable_cpus(),
        "cores": max(1, int(min(_usable_cpus(), _physical_cores(_affinity())))),
        "memory_gib": _memory_gib(),
        "torch_threads": _torch_threads(),
        "gpus": _gpus(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name)) is not None},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def default_threads(facts: Mapping[str, Any]) -> int:
    """Threads to compute with where none are asked for: what OMP_NUM_THREADS says, else one for every physical core.

    Two logical CPUs of one core share what multiplies.
    """
    # A list is of nested levels; the first is the outermost.
    said = facts["variables"].get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdecimal() and int(said) else int(facts["cores"])


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _physical_cores(cpus: Collection[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that logical CPUs are on; where the system does not tell, each is its own."""
    siblings = (_read(system / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip() for cpu in cpus)
    return len({said or f"cpu {cpu}" for cpu, said in zip(cpus, siblings, strict=True)})


def _usable_cpus() -> float:
    count = float(len(_affinity()))
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).strip().partition(" ")
    return min(count, round(int(quota) / int(period), 2)) if quota.isdigit() and period.isdigit() else count


def _memory_gib() -> float:
    return round(memory_bytes() / 2**30, 1)


def _torch_threads() -> int | None:
    torch: Any = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _gpus() -> list[str] | None:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
