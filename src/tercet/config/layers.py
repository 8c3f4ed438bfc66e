"""Layers of names and values, laid over each other and made into a config; and a config as YAML."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from tercet.config.values import convert, group_of, is_table
from tercet.errors import ConfigError

T = TypeVar("T")
Layer = Mapping[str, object]
UNSET = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a config class: dotted name, type, default (or `UNSET`), and where it is declared."""

    name: str
    kind: Any
    default: object
    owner: type
    positional: bool


def settings(cls: type, base: object = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config class, groups opened, in the order they are declared."""
    for field, kind in _fields(cls):
        default = _default(field, base)
        group = group_of(kind)
        if group is not kind:
            yield Setting(prefix + field.name, kind, default, cls, bool(field.metadata.get("positional")))
        if group is not None:
            yield from settings(group, default if isinstance(default, group) else None, f"{prefix}{field.name}.")


def from_mapping(cls: type[T], mapping: Layer, base: T | None = None) -> T:
    """A config from (nested or dotted) names and values; what is not named is taken from `base`, or from the defaults.

    Raises:
        ConfigError: A name is unknown, a value has another type, or a setting without a default is missing.
    """
    return build(cls, checked(cls, mapping), base)


def load(cls: type[T], path: Path | str, base: T | None = None) -> T:
    """A config from a YAML file; as `from_mapping`, and an error names the file."""
    layer = read(path)
    try:
        return from_mapping(cls, layer, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read(path: Path | str) -> Layer:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{path}: holds {found!r:.60}; a config file holds 'name: value' lines")
    return found or {}


def to_yaml(config: object) -> str:
    """YAML that `from_mapping` reads back to an equal config."""
    return str(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True))


def to_mapping(value: Any) -> Any:
    """The same value in what YAML has: mappings, lists, text, numbers, truth values and None."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return str(value) if isinstance(value, Path | str) else value


def differences(a: Layer, b: Layer) -> list[str]:
    """Dotted names of the settings in which two nested mappings differ.

    >>> differences({"seed": 0, "sft": {"rank": 8, "data": "x"}}, {"seed": 0, "sft": {"rank": 16, "data": "x"}})
    ['sft.rank']
    """
    names: list[str] = []
    for key in [*a, *(key for key in b if key not in a)]:
        ours, theirs = a.get(key, UNSET), b.get(key, UNSET)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            names += [f"{key}.{name}" for name in differences(ours, theirs)]
        elif ours != theirs:
            names.append(key)
    return names


def suggestion(word: str, known: Iterable[str]) -> str:
    """How an error about an unknown word ends: with the nearest known one, or with all when none is near.

    >>> suggestion("lerning_rate", ["sft.learning_rate", "seed"])
    "did you mean 'sft.learning_rate'?"
    """
    names = list(known)
    ends = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    near = difflib.get_close_matches(word, names, n=1)
    near = near or [ends[end] for end in difflib.get_close_matches(word.rsplit(".", 1)[-1], ends, n=1)]
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"


def checked(cls: type, layer: Layer, prefix: str = "") -> dict[str, object]:
    """A layer with dotted names unfolded and hyphens made underscores.

    Raises:
        ConfigError: A name is not one of the config's; the message names the nearest that is.
    """
    found: dict[str, object] = {}
    kinds = {field.name: kind for field, kind in _fields(cls)}
    for key, value in layer.items():
        head, _, rest = str(key).partition(".")
        name = head.replace("-", "_")
        group = group_of(kinds.get(name))
        if name not in kinds or (rest and group is None and not is_table(kinds[name])):
            ours = [setting.name for setting in settings(cls, prefix=prefix)]
            raise ConfigError(f"unknown setting {prefix + str(key)!r}; {suggestion(prefix + str(key), ours)}")
        value = {rest: value} if rest else value
        if group is not None and isinstance(value, Mapping):
            value = checked(group, value, f"{prefix}{name}.")
        found = merged(found, {name: value})
    return found


def merged(under: Layer, over: Layer) -> dict[str, object]:
    """Two checked layers as one; `over` wins, setting by setting."""
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return both


def build(cls: type[T], layer: Layer, base: T | None = None, prefix: str = "") -> T:
    """A config from a checked layer. Every check of the class itself sees the final values only."""
    values: dict[str, object] = {}
    for field, kind in _fields(cls):
        name = prefix + field.name
        default = _default(field, base)
        if field.name in layer:

            def group(inner: type, given: Layer, default: object = default, name: str = name) -> object:
                return build(inner, given, default if isinstance(default, inner) else None, f"{name}.")

            values[field.name] = convert(kind, layer[field.name], name, group)
        elif default is UNSET:
            raise ConfigError(f"{name} is not set; give it on the command line or in the config file")
        else:
            values[field.name] = default
    try:
        return cls(**values)
    except ConfigError as error:
        raise (ConfigError(f"{prefix[:-1]}: {error}") if prefix else error) from None


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = _hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _default(field: dataclasses.Field[Any], base: object) -> object:
    if base is not None:
        return getattr(base, field.name)
    return field.default_factory() if field.default_factory is not UNSET else field.default
