"""Measure tercet beside its peers: `python benchmarks/run.py --data hh.jsonl.gz --output out.json`.

Prints a table and writes json. `--only` takes names of rows; `--smoke` runs our own sides of every row once on a tiny
model. docs/performance.md tells the method.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Row, SideHere, SideProcess, Work
from random_model import SIZES, random_model
from record import SETTING, commit, compared, gpu, machine, number, read, setting_of, table, today
from rows import ANYWHERE, ASKED_FOR, ROWS
from work import build, write

# What the tests' environment lacks.
INSTALLED_APART = ("trl", "vllm")


def parse(argv: list[str]) -> argparse.Namespace:
    """What was asked for: names of `rows`, the `setting` they are computed in, and rows `measured` before."""
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides compute")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' base")
    parser.add_argument("--random-size", choices=list(SIZES), help="random weights of that size, --model's tokenizer")
    args = parser.parse_args(argv)
    if not args.smoke and args.data is None:
        parser.error("--data is missing; give a file of comparisons, or --smoke")
    args.setting = {"device": args.device, "dtype": args.dtype, "random_size": args.random_size}
    usual = args.setting == SETTING
    args.rows = args.only or ([name for name in ROWS if name not in ASKED_FOR] if usual else list(ANYWHERE))
    if not usual and (unfit := set(args.rows) - set(ANYWHERE)):
        parser.error(f"{', '.join(sorted(unfit))}: measured on a CPU in float32 alone; name {', '.join(ANYWHERE)}")
    if args.device == "cuda" and gpu() is None:
        parser.error("--device is cuda and torch sees none; take cpu")
    args.measured = read(args.output) if args.output and args.output.exists() else {}
    if others := sorted(name for name, kept in args.measured.items() if setting_of(kept) != args.setting):
        parser.error(f"{args.output} has rows of another device, dtype or size ({', '.join(others)}); name another")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)

    import torch

    from tercet.models.names import resolve

    measured: dict[str, Any] = args.measured
    threads = args.threads or torch.get_num_threads()
    stamp = {
        "machine": {**machine(threads), "gpu": gpu() if args.device == "cuda" else None},
        "setting": args.setting,
        **commit(), "measured": today(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        model = resolve("tiny" if args.smoke else args.model)
        if args.random_size:
            model = random_model(Path(directory) / "model", args.random_size, model, args.dtype)
        work = build(str(model), args.data, smoke=args.smoke).with_settings(device=args.device, dtype=args.dtype)
        if args.device == "cuda":
            # A GPU is not busy with a few rows, and has room for all.
            work = work.with_settings(micro_batch_rows=work.settings["groups"] * work.settings["group_size"])
        for name in args.rows:
            row = ROWS[name]
            if name == "vllm" and not args.vllm_python and not args.smoke:
                print("vllm: left out; it needs --vllm-python", file=sys.stderr)
                continue
            absent = () if not args.smoke else INSTALLED_APART[1:] if args.peers else INSTALLED_APART
            sides = [side for side in row.sides if side not in absent]

            def start(side: str, given: Work, row: Row = row) -> SideHere | SideProcess:
                if args.together:
                    return SideHere(row, side, given)
                file = Path(directory) / "work.json"
                write(given, file)
                return SideProcess(python_of(side, args), row.name, side, file, threads)

            given, tried = least_memory(row, work, start) if row.trial and row.trial.side in sides else (work, {})
            repeats = 1 if args.smoke else args.repeats
            found = measure(row, [partial(start, side, given) for side in sides], repeats, args.dtype)
            measured[name] = {**found, **({"tried": tried} if tried else {}), **stamp}
            print(f"{name}: {number(measured[name]['value'])} (target {row.target})", file=sys.stderr)
            if args.output:
                args.output.write_text(json.dumps({"rows": measured}, indent=1) + "\n")
    print(table(measured))
    return 1 if any(row["differ"] for row in measured.values()) else 0


def least_memory(
    row: Row, work: Work, start: Callable[[str, Work], SideHere | SideProcess]
) -> tuple[Work, dict[str, Any]]:
    """One run of a side under each choice of its setting, each in a process of its own, since the most memory that a
    process has had never falls; the work with the choice of least memory, and what all of them took."""
    assert row.trial is not None
    setting, tried = row.trial.setting, {}
    choices = work.settings[f"{setting}_tried"]
    for choice in choices:
        process = start(row.trial.side, work.with_settings(**{setting: choice}))
        try:
            process.run()
            tried[str(choice)] = process.summary()
        finally:
            process.close()
    best = min(choices, key=lambda choice: tried[str(choice)]["rss_mb"])
    return work.with_settings(**{setting: best}), {"setting": setting, "taken": best, "choices": tried}


def python_of(side: str, args: argparse.Namespace) -> str:
    """vLLM has an environment of its own."""
    return str(args.vllm_python) if side == "vllm" and args.vllm_python else sys.executable


def measure(
    row: Row, start: Sequence[Callable[[], SideHere | SideProcess]], repeats: int, dtype: str = "float32"
) -> dict[str, Any]:
    """The sides of a row in turns, ours first, and what comes of them."""
    processes: list[SideHere | SideProcess] = []
    try:
        for each in start:
            processes.append(each())
        for _ in range(repeats):
            for process in processes:
                process.run()
        found = {p.side: {**p.summary(), "versions": p.versions} for p in processes}
        runs = [process.runs for process in processes]
    finally:
        for process in processes:
            process.close()
    ours, *others = found.values()
    if row.of == "slope":
        value = median(run["same"]["slope"] for run in runs[0])
    elif row.of in ("arithmetic", "bandwidth"):
        value = ours[row.of]
    elif not others:
        value = None
    elif row.of == "rss_mb":
        value = others[0]["rss_mb"] / ours["rss_mb"]
    else:
        # Runs beside each other met the same machine: the median of their ratios, not the ratio of medians.
        value = median(b["seconds"] / a["seconds"] for a, b in zip(runs[0], runs[1], strict=True))
    reached = value is not None and (value <= row.target if row.of == "slope" else value >= row.target)
    return {
        "what": row.what, "of": row.of, "target": row.target, "value": value, "reached": reached, "sides": found,
        **compared(row, list(found.values()), dtype),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
