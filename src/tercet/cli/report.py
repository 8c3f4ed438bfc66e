"""`tercet report`: report.html of a run, finished or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tercet.config import parse


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make report.html of a run, also of one that is still going on."""

    run: Path = field(default=Path("runs/rlhf"), metadata={"positional": True})
    """The folder of a run, or of a whole tercet rlhf."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(ReportConfig, argv, prog="tercet report")
    from tercet.runs.report import write_report

    print(write_report(config.run))
    return 0
