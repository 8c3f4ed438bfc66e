"""`tercet chat`: base, SFT and RL policies side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tercet.cli.closing import say
from tercet.config import parse
from tercet.errors import UsageError
from tercet.recipes.talking import ChatConfig, open_talk

if TYPE_CHECKING:
    from rich.console import Console

HELP = "/reset begins anew, /quit (or Ctrl-D) ends"


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(ChatConfig, argv, prog="tercet chat")
    talk = open_talk(config, say=say)
    from rich.console import Console

    console = Console()
    say(f"{', '.join(speaker.name for speaker in talk.speakers)} answer. {HELP}.")
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            talk.reset()
            say("Every conversation begins anew.")
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command: {HELP}.")
        elif line:
            try:
                _show(console, talk.ask(line))
            except UsageError as error:
                say(f"tercet: {error}")
    return 0


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  importing it gives `input` a history and editing keys

    while True:
        try:
            yield input("\nyou> ").strip()
        except EOFError:
            print()
            return


def _show(console: Console, answers: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    if console.is_terminal:
        table = Table(*answers, expand=True, show_lines=False)
        for column in table.columns:
            column.ratio, column.overflow = 1, "fold"
        table.add_row(*map(Text, answers.values()))
        console.print(table)
    else:
        for name, text in answers.items():
            say(f"{name}> {text}")
