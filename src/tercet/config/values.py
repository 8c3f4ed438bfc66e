"""One value: what a setting wants, said in words, and a given value as that."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from tercet.errors import ConfigError

Group = Callable[[type, Mapping[str, object]], object]


class Typed(str):
    """A value from the command line: text that still has to become what the setting wants."""


def options(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def group_of(kind: Any) -> type | None:
    """The dataclass of a setting that is a group (also of one that may be None), else None."""
    return next(
        (option for option in options(kind) if isinstance(option, type) and dataclasses.is_dataclass(option)), None
    )


def is_list(kind: Any) -> bool:
    """Whether a setting takes several values."""
    return any(get_origin(option) in (tuple, list, Sequence) for option in options(kind))


def is_table(kind: Any) -> bool:
    """Whether a setting takes names of the user's choosing with values."""
    return any(get_origin(option) in (dict, Mapping) for option in options(kind))


def wanted(kind: Any) -> str:
    """A type in words.

    >>> wanted(float | None)
    'a number or none'
    """
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if len(options(kind)) > 1:
        return " or ".join(wanted(option) for option in options(kind))
    if is_list(kind):
        args = [item for item in get_args(kind) if item is not ...]
        return f"{'a list of' if len(args) == 1 else len(args)} items, each {wanted(args[0])}"
    if is_table(kind):
        return f"names, each with {wanted(get_args(kind)[1])}"
    return "none" if kind is types.NoneType else names.get(kind, "a group of settings")


def convert(kind: Any, value: object, name: str, group: Group) -> Any:
    """`value` as the type `kind`.

    Text is read as the number that is wanted, since YAML takes 1e-4 for text.

    Args:
        kind: The annotation of the setting.
        value: From YAML, from Python, or `Typed`.
        name: Dotted name, for the message.
        group: Makes a dataclass of a mapping.

    Raises:
        ConfigError: The value is of another type.
    """
    wrong = ConfigError(f"{name} is {value if value is None else repr(_plain(value))}; it must be {wanted(kind)}")
    if isinstance(value, Typed) and value[:1] in ("[", "{") and (is_list(kind) or is_table(kind) or group_of(kind)):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise wrong from None
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, name, group, wrong)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return group(kind, value)  # type: ignore[arg-type]
    if is_list(kind) and isinstance(value, list | tuple | Typed):
        items = [value] if isinstance(value, Typed) else value
        kinds = args if origin is tuple and args[1:] != (...,) else args[:1] * len(items)
        if len(kinds) == len(items):
            made = [convert(kinds[i], item, f"{name}[{i}]", group) for i, item in enumerate(items)]
            return made if origin is list else tuple(made)
    if is_table(kind) and isinstance(value, Mapping):
        return {str(key): convert(args[1], item, f"{name}.{key}", group) for key, item in value.items()}
    found = _convert_plain(kind, value)
    if found is None:
        raise wrong
    return found


def _convert_plain(kind: Any, value: object) -> object:
    """Text, a path, a number or a truth value; None when it is not one."""
    if get_origin(kind) is Literal:
        typed = isinstance(value, Typed)
        same = (o for o in get_args(kind) if (str(o) == value if typed else (type(o), o) == (type(value), value)))
        return next(same, None)
    if kind is bool:
        return {"true": True, "false": False}.get(str(value).lower()) if isinstance(value, bool | Typed) else None
    if kind is str or kind is Path:
        return kind(value) if isinstance(value, str | Path) else None
    if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return kind(value) if kind is float or not isinstance(value, float) else None
        except ValueError:
            return None
    return None


def _convert_union(kinds: tuple[Any, ...], value: object, name: str, group: Group, wrong: ConfigError) -> Any:
    if types.NoneType in kinds and (value is None or (isinstance(value, Typed) and value.lower() in ("none", "null"))):
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    if isinstance(value, Mapping | list | tuple):
        fits = is_list if isinstance(value, list | tuple) else lambda kind: is_table(kind) or group_of(kind) is not None
        rest = [kind for kind in rest if fits(kind)]
        if len(rest) == 1:  # what is wrong inside is said by the one it is meant for
            return convert(rest[0], value, name, group)
    # A value keeps its own type where the union has it, so that what was written reads back equal; typed text is text
    # only when it is nothing else.
    for kind in sorted(rest, key=lambda kind: (type(value) is not kind, kind is str)):
        try:
            return convert(kind, value, name, group)
        except ConfigError:
            continue
    raise wrong


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Typed) else value
