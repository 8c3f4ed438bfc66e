"""The command line of a config: `--name value`, `name=value`, `--config`, `--preset`, `--print-config`, `--help`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from tercet.config.layers import UNSET, Layer, Setting, build, checked, merged, read, settings, suggestion, to_yaml
from tercet.config.values import Typed, is_list, options
from tercet.errors import ConfigError

T = TypeVar("T")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def parse(cls: type[T], argv: Sequence[str], *, prog: str, description: str = "") -> T:
    """The config that a command line asks for.

    A field with `metadata={"positional": True}` is given without its name, in the order declared; a list among them
    takes all that is left. `cls.PRESETS`, where it is declared, maps names to (nested or dotted) settings.

    Args:
        cls: A frozen dataclass; the docstring under a field is its help.
        argv: The words after the verb.
        prog: The words before, as in "tercet sft".
        description: What the verb does; the first line of the class's docstring when empty.

    Raises:
        ConfigError: A name is unknown, a value has another type, or a setting without a default is missing.
        SystemExit: 0, once `--help` or `--print-config` has printed what was asked.
    """
    if {"-h", "--help"} & set(argv):
        print(_help(cls, prog, description or _first_line(cls)), end="")
        raise SystemExit(0)
    presets: Mapping[str, Layer] = getattr(cls, "PRESETS", {})
    asked, given = _scan(cls, argv, ("config", "preset") if presets else ("config",))
    layers = []
    for name in asked["preset"]:
        if name not in presets:
            raise ConfigError(f"unknown preset {name!r}; {suggestion(name, presets)}")
        layers.append(checked(cls, presets[name]))
    for path in asked["config"]:
        layer = read(path)
        try:
            layers.append(checked(cls, layer))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    config = build(cls, functools.reduce(merged, [*layers, given]))
    if asked["print-config"]:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _scan(cls: type, argv: Sequence[str], asking: Collection[str]) -> tuple[dict[str, list[str]], dict[str, object]]:
    """What is asked of the parser itself (`asking` take a value), and the layer of settings."""
    known = {setting.name: setting for setting in settings(cls)}
    places = [setting for setting in known.values() if setting.positional]
    asked: dict[str, list[str]] = {"config": [], "preset": [], "print-config": []}
    layer: dict[str, object] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, text = word.removeprefix("--").partition("=")
        if word == "--print-config":
            asked["print-config"].append("")
        elif word.startswith("--") and name in asking:
            asked[name].append(text if equals else _next(words, word))
        elif word.startswith("--") or _OVERRIDE.match(word):
            setting = known.get(name.replace("-", "_"))
            negated = known.get(name.removeprefix("no-").replace("-", "_"))
            value: object = Typed(text)
            if setting is None and negated is not None and bool in options(negated.kind) and not equals:
                setting, value = negated, Typed("false")
            elif not equals:
                value = _values(setting, words, word, known) if setting else Typed(words[0] if words else "")
            layer = merged(layer, checked(cls, {setting.name if setting else name: value}))
            if setting is None and not equals:
                _next(words, word)
        elif places:
            words.appendleft(word)
            place = places.pop(0)
            layer[place.name] = _values(place, words, word, known)
        else:
            raise ConfigError(f"{word!r} was not expected here; a setting is given as --name value or name=value")
    return asked, layer


def _values(setting: Setting, words: deque[str], word: str, known: Collection[str]) -> object:
    """The words that belong to a setting, taken off the front.

    What looks like name=value belongs to a list only where its first word does so too, and no setting has that name.
    """
    if is_list(setting.kind):
        found: list[Typed] = []
        pairs = bool(words and _OVERRIDE.match(words[0]))
        while words and not words[0].startswith("--"):
            if _OVERRIDE.match(words[0]) and (not pairs or _names_one(words[0], known)):
                break
            found.append(Typed(words.popleft()))
        return found[0] if len(found) == 1 else found
    if bool in options(setting.kind) and not (words and words[0].lower() in ("true", "false", "none")):
        return Typed("true")
    return Typed(_next(words, word))


def _names_one(word: str, known: Collection[str]) -> bool:
    """Whether name=value names a setting, or a member of one that has names of the user's choosing."""
    name = word.partition("=")[0].replace("-", "_")
    return any(name == each or name.startswith(f"{each}.") for each in known)


def _next(words: deque[str], word: str) -> str:
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{word} needs a value")
    return words.popleft()


def _help(cls: type, prog: str, description: str) -> str:
    found = list(settings(cls))
    places = [setting for setting in found if setting.positional]
    usage = " ".join([prog, *map(_place, places), "[--name value | name=value ...]"])
    layout = functools.partial(argparse.HelpFormatter, max_help_position=36)
    parser = argparse.ArgumentParser(usage=usage, description=description, add_help=False, formatter_class=layout)
    general = parser.add_argument_group("options")
    general.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins over it")
    presets: Mapping[str, Layer] = getattr(cls, "PRESETS", {})
    if presets:
        general.add_argument("--preset", metavar="NAME", help=f"start from these settings: {', '.join(presets)}")
    general.add_argument("--print-config", action="store_true", help="print the settings as YAML, and stop")
    general.add_argument("--help", action="store_true", help="print this, and stop")
    groups: dict[object, argparse._ArgumentGroup] = {}
    # Its own settings first, then those of the classes it extends, then the groups inside it.
    for setting in sorted(found, key=lambda each: ("." in each.name, _distance(each))):
        title = setting.name.rpartition(".")[0] or _declarer(setting)
        if title not in groups:
            name = title if isinstance(title, str) else "settings" if title is cls else _first_line(title).rstrip(".")
            groups[title] = parser.add_argument_group(name, _first_line(setting.owner) if title == name else "")
        default = "required" if setting.default is UNSET else f"default: {_in_words(setting.default)}"
        text = " ".join([_docs(setting.owner).get(setting.name.rpartition(".")[2], ""), f"({default})"]).strip()
        flag = f"--{setting.name.replace('_', '-')}"
        groups[title].add_argument(flag, metavar=_metavar(setting.kind), help=text.replace("%", "%%"))
    return parser.format_help()


def _distance(setting: Setting) -> int:
    return 0 if "." in setting.name else setting.owner.__mro__.index(_declarer(setting))


def _declarer(setting: Setting) -> type:
    """The class whose body has the setting: a config may extend others."""
    name = setting.name.rpartition(".")[2]
    return next(c for c in setting.owner.__mro__ if name in inspect.get_annotations(c))


def _place(setting: Setting) -> str:
    name = setting.name.upper() + (" ..." if is_list(setting.kind) else "")
    return name if setting.default is UNSET else f"[{name}]"


def _in_words(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "nothing"
    return "as below" if dataclasses.is_dataclass(value) else str(value) or "empty"


def _metavar(kind: Any) -> str:
    names = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT", Path: "PATH", NoneType: "none"}
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if len(options(kind)) > 1:
        return "|".join(_metavar(option) for option in options(kind))
    if is_list(kind):
        return f"{_metavar(get_args(kind)[0])} ..."
    return names.get(kind, "MAPPING")


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """The docstring under each field, also of the classes this one extends."""
    found: dict[str, str] = {}
    for owner in [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]:
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except OSError:  # no source to read, as at an interactive prompt
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for field, below in itertools.pairwise(lines):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = below.value.value if isinstance(below.value, ast.Constant) else None
                if isinstance(text, str):
                    found[field.target.id] = " ".join(text.split())
    return found
