"""Measure tercet beside its peers: `python benchmarks/run.py --data hh.jsonl.gz --output out.json`.

Prints a table and writes json. `--only` takes names of rows; `--smoke` runs our own sides of every row once on a tiny
model. docs/performance.md tells the method.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Row, SideHere, SideProcess, disagreement
from rows import ROWS
from work import build, write

# What the tests' environment lacks.
INSTALLED_APART = ("trl", "vllm")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name or directory of the model")
    parser.add_argument("--data", type=Path, help="json lines with `chosen` and `rejected` as in HH-RLHF")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), help="rows to measure; all by default")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--threads", type=int, help="threads of each side; as many as torch would take by default")
    parser.add_argument("--vllm-python", help="python of an environment with vllm; without, its row is left out")
    parser.add_argument("--output", type=Path, help="where the json goes; rows that are there already are kept")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one run, without TRL and vLLM")
    parser.add_argument("--together", action="store_true", help="all sides in this process: quick, memory says nothing")
    parser.add_argument("--peers", action="store_true", help="with --smoke: TRL too")
    args = parser.parse_args(argv)
    if not args.smoke and args.data is None:
        parser.error("--data is missing; give a file of comparisons, or --smoke")

    import torch

    from tercet.models.names import resolve

    threads = args.threads or torch.get_num_threads()
    measured = json.loads(args.output.read_text())["rows"] if args.output and args.output.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "work.json"
        model = resolve("tiny" if args.smoke else args.model)
        work = build(str(model), args.data, smoke=args.smoke)
        write(work, file)
        for name in args.only or ROWS:
            row = ROWS[name]
            if name == "vllm" and not args.vllm_python and not args.smoke:
                print("vllm: left out; it needs --vllm-python", file=sys.stderr)
                continue
            absent = () if not args.smoke else INSTALLED_APART[1:] if args.peers else INSTALLED_APART
            sides = [side for side in row.sides if side not in absent]
            repeats = 1 if args.smoke else args.repeats
            start = [
                partial(SideHere, row, side, work)
                if args.together
                else partial(SideProcess, python_of(side, args), name, side, file, threads)
                for side in sides
            ]
            measured[name] = {**measure(row, start, repeats), **machine(threads)}
            print(f"{name}: {_number(measured[name]['value'])} (target {row.target})", file=sys.stderr)
            if args.output:
                args.output.write_text(json.dumps({"rows": measured}, indent=1) + "\n")
    print(table(measured))
    return 1 if any(row["differ"] for row in measured.values()) else 0


def python_of(side: str, args: argparse.Namespace) -> str:
    """vLLM has an environment of its own."""
    return str(args.vllm_python) if side == "vllm" and args.vllm_python else sys.executable


def measure(row: Row, start: Sequence[Callable[[], SideHere | SideProcess]], repeats: int) -> dict[str, Any]:
    """The sides of a row in turns, ours first, and what comes of them."""
    processes: list[SideHere | SideProcess] = []
    try:
        for each in start:
            processes.append(each())
        for _ in range(repeats):
            for process in processes:
                process.run()
        found = {process.side: process.summary() for process in processes}
        runs = [process.runs for process in processes]
    finally:
        for process in processes:
            process.close()
    ours, *others = found.values()
    if row.of == "slope":
        value = median(run["same"]["slope"] for run in runs[0])
    elif row.of == "arithmetic":
        value = ours["arithmetic"]
    elif not others:
        value = None
    elif row.of == "rss_mb":
        value = others[0]["rss_mb"] / ours["rss_mb"]
    else:
        # Runs beside each other met the same machine: the median of their ratios, not the ratio of medians.
        value = median(b["seconds"] / a["seconds"] for a, b in zip(runs[0], runs[1], strict=True))
    reached = value is not None and (value <= row.target if row.of == "slope" else value >= row.target)
    apart = disagreement([side["same"] for side in found.values()]) if others else {}
    return {
        "what": row.what, "of": row.of, "target": row.target, "value": value, "reached": reached, "sides": found,
        "apart": apart,
        "differ": {name: by for name, by in apart.items() if by > row.tolerances.get(name, row.tolerance)},
    }  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    """Where and with what it was measured."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for package in ("torch", "transformers", "peft", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cpu = names[0] if names else platform.processor()
    return {
        "machine": {"cpu": cpu, "cores": len(names), "threads": threads}, "versions": versions,
        "measured": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def _number(value: float | None) -> str:
    return "no peer" if value is None else f"{value:.2f}"


def table(measured: dict[str, Any]) -> str:
    """As markdown."""
    lines = [
        "| work | target | measured | tercet: s, tokens/s, MB | peer: s, tokens/s, MB | of GEMM peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in ((name, measured[name]) for name in ROWS if name in measured):
        unit, sign = (
            ("", "<=" if row["of"] == "slope" else ">=") if row["of"] in ("slope", "arithmetic") else ("x", ">=")
        )
        sides = [
            f"{side['median_seconds']:.2f}, {side['tokens_per_s']:.0f}, {side['rss_mb']:.0f}"
            for side in row["sides"].values()
        ]
        share = next(iter(row["sides"].values()))["arithmetic"]
        lines.append(
            f"| {row['what']} (`{name}`) | {sign} {row['target']}{unit} | {_number(row['value'])}{unit} | {sides[0]} | "
            f"{sides[1] if len(sides) > 1 else ''} | {'' if share is None else f'{share:.2f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
