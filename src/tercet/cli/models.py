"""`tercet models`: the built-in models and what is in the cache; `tercet models fetch NAME` fetches one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tercet.config import parse
from tercet.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List the built-in models and the cache, or fetch a model."""

    action: Literal["list", "fetch"] = field(default="list", metadata={"positional": True})
    """What to do."""
    name: str | None = field(default=None, metadata={"positional": True})
    """The model to fetch: a built-in name, or a hub id."""


def main(argv: list[str]) -> int:
    """Carry out the verb."""
    config = parse(ModelsConfig, argv, prog="tercet models")
    if config.action == "fetch":
        if config.name is None:
            raise UsageError("fetch what? For instance: tercet models fetch smollm2-135m")
        from tercet.models.names import resolve

        directory = resolve(config.name)
        print(f"{config.name} is in {directory} ({size_in_words(directory)})")
        return 0
    if config.name is not None:
        raise UsageError(f"list takes no name; to fetch it: tercet models fetch {config.name}")
    _list()
    return 0


def size_in_words(directory: Path) -> str:
    """How much a directory holds."""
    size_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from tercet.models.directories import cache_directory
    from tercet.models.names import BUILTIN
    from tercet.models.smollm2 import source

    cache = cache_directory() / "models"
    # A directory whose name begins with a dot is still being made.
    cached = sorted(path for path in cache.glob("[!.]*") if path.is_dir())
    names = Table(title="Built-in models", title_justify="left")
    for title in ("name", "what it is", "here"):
        names.add_column(title, overflow="fold")
    for name, built_in in BUILTIN.items():
        found = [path for path in cached if path.name == name or path.name.startswith(f"{name}-")]
        names.add_row(name, built_in.about, size_in_words(found[-1]) if found else f"no: tercet models fetch {name}")
    places = Table(title=f"In {cache}", title_justify="left")
    for title in ("directory", "size", "from"):
        places.add_column(title, overflow="fold")
    for path in cached:
        places.add_row(path.name, size_in_words(path), source(path) or "made on this machine")
    console = Console()
    console.print(names)
    console.print(places if cached else f"Nothing is in {cache} yet.")
    console.print("Any directory in Hugging Face's layout, and any hub id, can be given as a model too.")
