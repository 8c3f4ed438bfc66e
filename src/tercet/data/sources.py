"""Where rows come from: the built-in corpus, a file, a directory, or the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tercet.data.files import KINDS, Rows, kind_of, read_file
from tercet.errors import DataError

Purpose = Literal["conversations", "comparisons", "prompts"]

CORPUS = Path(__file__).parent / "corpus"
BUILTIN = {
    "conversations": CORPUS / "conversations.jsonl",
    "comparisons": CORPUS / "comparisons.jsonl",
    "prompts": CORPUS / "comparisons.jsonl",
}
"""The built-in corpus; what a policy answers are the prompts of its comparisons."""

SAME_SPLIT = {"train": ("train_{use}",), "test": ("test_{use}", "validation", "validation_{use}")}
"""Other names a split goes by, in the order they are tried; {use} is sft for conversations and prefs for the rest."""

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What in the name of a file or folder speaks of a split: the words the datasets library knows."""

_SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_SPLIT_NAME = re.compile(rf"(?<![a-z0-9])({'|'.join(_SPLIT_OF_WORD)})(_sft|_prefs|_gen)?(?![a-z0-9])")
# What `save_to_disk` and the hub put beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Opened:
    """A split of a source: its name there, and its rows, read as they are asked for."""

    split: str
    rows: Rows


def open_source(source: str, *, split: str, purpose: Purpose) -> Opened:
    """Find a source and one split of it.

    Raises:
        DataError: There is no such source or split.
    """
    found = _find(source, purpose)
    name = _choose(source, split, list(found), purpose)
    return Opened(name, found[name]())


def splits(source: str, *, purpose: Purpose = "conversations") -> tuple[str, ...]:
    """The names of the splits of a source. A single file is one split, "train".

    Raises:
        DataError: There is no such source.
    """
    return tuple(_find(source, purpose))


Splits = Mapping[str, Callable[[], Rows]]


def _find(source: str, purpose: Purpose) -> Splits:
    if source == "builtin":
        return _builtin(purpose)
    path, config = Path(source).expanduser(), ""
    if not path.exists() and ":" in source:
        name, _, config = source.rpartition(":")
        path = Path(name).expanduser()
    if config and path.is_dir():
        path = path / config
        if not path.exists():
            raise DataError(f"{source} means the folder {path}, which is not there; name a folder of {path.parent}")
    if path.is_file():
        return {"train": lambda: read_file(path)}
    if path.is_dir():
        return _directory(path)
    if kind_of(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        return _hub(source)
    raise DataError(
        f"no data at {source}: it is no file and no directory; give 'builtin', a hub id such as Anthropic/hh-rlhf "
        f"(or name:config), a directory, or a file that ends in {', '.join(KINDS)}"
    )


def _choose(source: str, wanted: str, available: list[str], purpose: Purpose) -> str:
    use = "sft" if purpose == "conversations" else "prefs"
    for name in (wanted, *(other.format(use=use) for other in SAME_SPLIT.get(wanted, ()))):
        if name in available:
            return name
    raise DataError(
        f"{source} has no split '{wanted}'; it has {', '.join(available)} (a single file is one split, 'train'). "
        f"Name one of these, or hold rows of one out"
    )


def _builtin(purpose: Purpose) -> Splits:
    path = BUILTIN[purpose]
    if not path.is_file():
        raise DataError(f"the built-in corpus lacks {path.name}; this installation is incomplete: install tercet again")

    def only(split: str) -> Rows:
        for where, row in read_file(path):
            if isinstance(row, Mapping) and row.get("split") == split:
                yield where, row

    return {"train": lambda: only("train"), "test": lambda: only("test")}


def _directory(directory: Path) -> Splits:
    if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
        return _saved(directory)
    files: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden and path.name not in _NOT_DATA and kind_of(path) is not None:
            files.setdefault(_split_of(path, directory), []).append(path)
    if not files:
        raise DataError(f"{directory} holds no file that ends in {', '.join(KINDS)} (.gz may follow)")
    for name, paths in files.items():
        kinds = {str(kind_of(path)) for path in paths}
        if len(kinds) > 1:
            raise DataError(
                f"{directory} holds files of several kinds for the split '{name}' ({', '.join(sorted(kinds))}), "
                f"which may be the same rows twice; give one file, or a directory with one kind"
            )
    return {name: _reader(paths) for name, paths in sorted(files.items(), key=lambda item: item[0] != "train")}


def _reader(paths: list[Path]) -> Callable[[], Rows]:
    return lambda: (pair for path in paths for pair in read_file(path))


def _split_of(path: Path, directory: Path) -> str:
    """The split a file belongs to, by its name or that of a folder it is in; files without such a name are train."""
    folders = path.relative_to(directory).parts[:-1]
    for name in (path.name, *reversed(folders)):
        if match := _SPLIT_NAME.search(name.lower()):
            return _SPLIT_OF_WORD[match[1]] + (match[2] or "")
    return "train"


def _saved(directory: Path) -> Splits:
    """A directory written by `save_to_disk` of the datasets library."""
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{directory} looks like a saved data set but cannot be loaded: {error}") from error
    return _of_dataset(loaded, str(directory))


def _hub(source: str) -> Splits:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded: Any = datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever the hub, its client or a data set's files bring forth
        raise DataError(
            f"{source} is neither a file or directory here nor could it be loaded from the hub: "
            f"{type(error).__name__}: {error}\nIf the hub cannot be reached, download the data elsewhere and give "
            f"the directory, or take 'builtin', which needs no download. HF_ENDPOINT, HF_TOKEN, HF_HOME and "
            f"HF_HUB_OFFLINE are honoured; a configuration is named as {name}:config"
        ) from error
    return _of_dataset(loaded, source)


def _of_dataset(loaded: Any, source: str) -> Splits:
    tables: Mapping[str, Iterable[Mapping[str, object]]] = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {name: _table_reader(f"{source}[{name}]", table) for name, table in tables.items()}


def _table_reader(where: str, table: Iterable[Mapping[str, object]]) -> Callable[[], Rows]:
    return lambda: ((f"{where}: row {number}", row) for number, row in enumerate(table, start=1))
