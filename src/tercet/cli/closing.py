"""How a training command speaks: what it says on the way, and the few lines it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def say(line: str) -> None:
    """Print a line at once, in step with the progress on standard error."""
    print(line, flush=True)


def finish(directory: Path, hints: Sequence[tuple[str, str]]) -> None:
    """Write the report, and print the numbers that matter, where the report lies and what to do next.

    Args:
        directory: A run's folder, or that of a whole `tercet rlhf`.
        hints: What one may want, and the command for it.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tercet.runs.folder import read_folder
    from tercet.runs.report import headline, verdict, write_report

    report = write_report(directory)
    folder = read_folder(directory)
    title = escape(verdict(folder)) if folder.win_rate("preference") else None
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for card in headline(folder):
        table.add_row(escape(card.label), escape(card.value), escape(card.detail))
    console = Console()
    console.print()
    if table.row_count:
        console.print(table)
    width = max(map(len, ["report", *(what for what, _ in hints)]))
    for what, where in (("report", str(report)), *hints):
        # Commands and paths are copied: they must not be broken at the width of the terminal.
        console.print(f"{what:<{width}}  [cyan]{escape(where)}[/]", soft_wrap=True, highlight=False)
