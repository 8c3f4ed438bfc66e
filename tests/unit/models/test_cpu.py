"""Products by oneDNN, and memory that is used again."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from tercet.models import cpu

FAULTS = """
import resource, sys, torch
from tercet.models.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def some_layers():
    return [torch.ones(10_000_000) for _ in range(4)]  # more than the C library keeps by itself

for _ in range(4):  # pieces that are aligned find their places in the first rounds
    some_layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
some_layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_linear_is_torchs_also_of_views(dtype: torch.dtype, rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((rows, 48), (40, 48), (40,)))
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(cpu.linear(x, weight), x @ weight.T, **close)
    torch.testing.assert_close(cpu.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), **close)
    back = torch.randn(rows, 40, generator=draw).to(dtype)
    torch.testing.assert_close(cpu.linear(back, weight.T), back @ weight, **close)
    if rows:
        torch.testing.assert_close(cpu.linear(x.T, back.T), x.T @ back, **close)


@pytest.mark.skipif(not cpu.has_onednn(), reason="needs a torch with oneDNN")
def test_float32_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    cpu.linear(torch.ones(2, 3), torch.ones(4, 3))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    def faults(word: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, word], capture_output=True, text=True, env={**os.environ}, check=True
        )
        return int(done.stdout)

    pages = 160_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < pages // 20
    # Without it the system hands them out again.
    assert faults("leave") > pages // 2
