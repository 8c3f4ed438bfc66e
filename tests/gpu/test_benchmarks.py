"""The benchmarks run on a GPU; skipped where there is none. What they say of time is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parents[2]


def test_rows_are_measured_on_a_gpu_with_the_memory_they_take_there(tmp_path: Path) -> None:
    output = tmp_path / "cuda.json"
    words = ["--smoke", "--together", "--device", "cuda", "--dtype", "bfloat16", "--random-size", "smallest"]
    command = [sys.executable, "benchmarks/run.py", *words, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert rows["mfu"]["value"] > 0 and rows["bandwidth"]["value"] > 0
    assert rows["gradient"]["machine"]["gpu"] == torch.cuda.get_device_name()
    for row in rows.values():
        assert all(side["gpu_mb"] > 0 and side["gemm_library"] == "cublas" for side in row["sides"].values())
