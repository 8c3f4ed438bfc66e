"""What is kept of a row beside its times, what is read back of old rows, and the table."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measuring import HERE, Row, disagreement
from rows import ROWS

# Both sides round to 8 bits at other places; the gradient of 135M parameters is some hundredths of its length off.
BFLOAT16_TOLERANCE = 0.1
SETTING = {"device": "cpu", "dtype": "float32", "random_size": None}
"""What rows without a setting were measured under."""


def machine(threads: int) -> dict[str, Any]:
    """Where it is measured."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": len(names), "threads": threads}


def gpu() -> str | None:
    """The name of the GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit() -> dict[str, Any]:
    """What is measured: git's commit, and whether code differs from it; nothing where there is no git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, timeout=60)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Results are written while it runs, and change no number.
    code = git("status", "--porcelain", "--", ":/src", ":/benchmarks", ":!/benchmarks/*.json", ":!/benchmarks/*.txt")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if code is None else bool(code)}


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def compared(row: Row, sides: Sequence[Mapping[str, Any]], dtype: str) -> dict[str, dict[str, float]]:
    """How far apart the sides' numbers are (`apart`), and those that are further than they may be (`differ`)."""
    apart = disagreement([side["same"] for side in sides]) if len(sides) > 1 else {}
    least = BFLOAT16_TOLERANCE if dtype == "bfloat16" else 0.0
    allowed = {name: max(row.tolerances.get(name, row.tolerance), least) for name in apart}
    return {"apart": apart, "differ": {name: by for name, by in apart.items() if by > allowed[name]}}


def setting_of(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Under what a row was measured."""
    return {**SETTING, **kept.get("setting", {})}


def read(path: Path) -> dict[str, Any]:
    """Rows of an earlier run, compared anew: what may differ is what today's row allows."""
    rows: dict[str, Any] = json.loads(path.read_text())["rows"]
    for name, kept in rows.items():
        if name in ROWS:
            kept.update(compared(ROWS[name], list(kept["sides"].values()), setting_of(kept)["dtype"]))
    return rows


def number(value: float | None) -> str:
    """As the table has it."""
    return "no peer" if value is None else f"{value:.2f}"


def table(measured: Mapping[str, Any]) -> str:
    """As markdown."""
    lines = [
        "| work | target | measured | tercet: s, tokens/s, MB | peer: s, tokens/s, MB | of GEMM peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in ((name, measured[name]) for name in ROWS if name in measured):
        sign, unit = "<=" if row["of"] == "slope" else ">=", "x" if row["of"] in ("seconds", "rss_mb") else ""
        sides = [_side(side) for side in row["sides"].values()]
        shown = number(row["value"]) + (unit if row["value"] is not None else "")
        share = next(iter(row["sides"].values()))["arithmetic"]
        lines.append(
            f"| {row['what']} (`{name}`) | {sign} {row['target']}{unit} | {shown} | {sides[0]} | "
            f"{sides[1] if len(sides) > 1 else ''} | {'' if share is None else f'{share:.2f}'} |"
        )
    return "\n".join(lines)


def _side(side: Mapping[str, Any]) -> str:
    on_gpu = "" if side.get("gpu_mb") is None else f" (GPU {side['gpu_mb']:.0f})"
    return f"{side['median_seconds']:.2f}, {side['tokens_per_s']:.0f}, {side['rss_mb']:.0f}{on_gpu}"
