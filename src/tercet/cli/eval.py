"""`tercet eval`: who wins, and how good the judge is; or answers for another tool to judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tercet.cli.closing import say
from tercet.config import parse
from tercet.errors import UsageError
from tercet.recipes.exporting import export_answers
from tercet.recipes.measure import MeasureConfig, measure
from tercet.recipes.rl import as_json
from tercet.runs.durable import write_atomically


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(MeasureConfig, argv, prog="tercet eval")
    if config.export is not None:
        if config.first_judge is not None or config.held_out_judge is not None:
            raise UsageError(f"{config.export} judges by itself; leave the judge away, or --export")
        print(export_answers(replace(config, policy=config.policy or config.run), say=say))
        return 0
    if config.out is not None and config.out.exists():
        raise UsageError(f"{config.out} exists, and nothing is overwritten; name another file with --out")
    found = measure(config, say=say)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out, as_json(found))
    _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    """Tables, narrow enough for 80 columns."""
    judges = found.get("judges", {})
    _table("Win rates", ("", "judge", "win rate", "stderr", "95% interval", "equal length", "prompts"), [
        (f"{row['policy']} against {row['against']}", row["judge"], _share(row["win_rate"]), _share(row["stderr"]),
         f"{_share(row['low'])} to {_share(row['high'])}", _share(row.get("lc_win_rate", math.nan)), str(row["n"]))
        for row in found.get("win_rates", [])
    ])  # fmt: skip
    _table("Policies", ("", "tokens", "truncated", "entropy (nats)", "KL to baseline (nats)"), [
        (name, f"{row['mean_length']:.1f}", _share(row["clipped_ratio"]), f"{row['entropy']:.3f}", f"{row['kl']:.3f}")
        for name, row in found.get("policies", {}).items()
    ])  # fmt: skip
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "comparisons": lambda judge: str(judge["n"]),
        "accuracy of single verdicts": lambda judge: _share(judge["accuracy"]),
        "accuracy of both orders together": lambda judge: _share(judge["accuracy_both"]),
        "  where the shorter answer is better": lambda judge: _share(judge["accuracy_short_chosen"]),
        "  where the longer answer is better": lambda judge: _share(judge["accuracy_long_chosen"]),
        "verdict flips with the order": lambda judge: _share(judge["flip_rate"]),
        "expected calibration error": lambda judge: _share(judge["ece"]),
        "NLL (nats)": lambda judge: f"{judge['nll']:.3f}",
    }
    _table("Judges", ("", *judges), [
        (what, *(value(judge) for judge in judges.values())) for what, value in lines.items() if judges
    ])  # fmt: skip
    _table("Calibration", ("judge", "confidence", "right", "verdicts"), [
        (name, _share(each["confidence"]), _share(each["accuracy"]), str(each["n"]))
        for name, judge in judges.items()
        for each in judge["calibration"]
    ])  # fmt: skip


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 or name == "judge" else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"
