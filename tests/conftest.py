"""What every test shares: one thread, no network, a cache of its own, and no GPU tests without a GPU."""

import os
import shutil
import tempfile

import pytest

# Before torch is imported anywhere: several workers with a thread per core each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

_own_cache: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    if "TERCET_CACHE" not in os.environ:  # workers inherit it, so the first process makes it for all
        _own_cache.append(tempfile.mkdtemp(prefix="tercet-tests-"))
        os.environ["TERCET_CACHE"] = _own_cache[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    for directory in _own_cache:
        shutil.rmtree(directory, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in for_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
