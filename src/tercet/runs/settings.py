"""The config of a run folder: written once, compared when the run goes on."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import yaml

from tercet.errors import ConfigError
from tercet.runs.durable import write_atomically


def plain(value: object) -> object:
    """The same value in words that YAML has: mappings, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError(f"a config cannot hold {value!r} ({type(value).__name__}): YAML has no word for it")


def keep_config(path: Path, config: Mapping[str, object], *, may_differ: Set[str] = frozenset()) -> None:
    """Write `config` to `path`, or compare it with what stands there.

    Args:
        path: The run's `config.yaml`.
        config: What the run is to be done with now.
        may_differ: Dotted names of fields, or of groups of fields, whose change is no matter; they are written anew.

    Raises:
        ConfigError: Another field differs; the message names it with both values.
    """
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    if not path.exists():
        write_atomically(path, text)
        return
    old_text = path.read_text()
    check_same_config(yaml.safe_load(old_text), yaml.safe_load(text), may_differ=may_differ, directory=path.parent)
    if text != old_text:
        write_atomically(path, text)


def check_same_config(
    old: Mapping[str, object], new: Mapping[str, object], *, directory: Path, may_differ: Set[str] = frozenset()
) -> None:
    """Refuse to go on with a run whose config was another.

    Raises:
        ConfigError: Names each field that differs, the value there and the value now, and what to do.
    """
    changes = [change for change in _changes(old, new) if not _is_free(change[0], may_differ)]
    if not changes:
        return
    lines = "\n".join(f"  {name}: {before} there, {after} now" for name, before, after in changes)
    raise ConfigError(
        f"the run in {directory} was started with another config:\n{lines}\n"
        f"put {'it' if len(changes) == 1 else 'them'} back to go on with that run, or choose another --out"
    )


def _changes(old: object, new: object, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes(old.get(key, _UNSET), new.get(key, _UNSET), f"{name}.{key}" if name else str(key))
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        yield name, _show(old), _show(new)


def _is_free(name: str, may_differ: Set[str]) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in may_differ)


def _show(value: object) -> str:
    return "(not set)" if value is _UNSET else repr(value)


_UNSET = object()
