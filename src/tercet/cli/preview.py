"""`tercet preview`: what a model would learn from data, token by token."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tercet import data
from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import TRAIN_ON, Renderer
from tercet.config import parse
from tercet.data import Loaded
from tercet.errors import ConfigError, DataError
from tercet.recipes.rows import gives_comparisons
from tercet.types import Datum

Kind = Literal["auto", "conversations", "comparisons", "prompts"]
# Enough for a mean, few enough to be there at once.
COUNTED_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Show what a model would learn from data: learned tokens in colour, the others dim."""

    data: str = field(default="builtin", metadata={"positional": True})
    """Rows: builtin, a hub id (name or name:config), a folder, or a json, jsonl, parquet or csv file."""
    kind: Kind = "auto"
    """What the rows are read as; auto is comparisons where rows have two answers, else conversations."""
    split: str = "train"
    """The split of the data."""
    rows: int = 3
    """Rows shown."""
    model: str = "smollm2-135m"
    """The model whose tokenizer is used."""
    renderer: str = "auto"
    """How conversations become tokens: chat_template, role_colon, or auto (the template when there is one)."""
    train_on: str = "all_assistant_messages"
    """What of a conversation is learned, as in tercet sft."""
    max_length: int = 1024
    """Longest sequence in tokens, as in training."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used and count them, instead of stopping at the first."""
    trust_remote_code: bool = False
    """Let Python files that came with a model run."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows is {self.rows}; it must be at least 1")
        if self.train_on not in TRAIN_ON:
            raise ConfigError(f"train_on is {self.train_on!r}; it must be one of {', '.join(TRAIN_ON)}")


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(PreviewConfig, argv, prog="tercet preview")
    from rich.console import Console

    from tercet.chat.preview import coloured
    from tercet.chat.renderers import renderer
    from tercet.models.load import load_tokenizer

    chosen = renderer(config.renderer, load_tokenizer(config.model, trust_remote_code=config.trust_remote_code))
    console = Console(highlight=False)
    for kind in _kinds(config):
        rows = _load(kind, config)
        make = _maker(kind, chosen, config)
        found = [_datum(make, row) for row in rows.rows[: max(COUNTED_ROWS, config.rows)]]
        console.print(rows.describe(), style="bold", markup=False, soft_wrap=True)
        console.print(f"{kind}, written by {chosen.name} with the tokenizer of {config.model}", soft_wrap=True)
        console.print(_counts(found, config.max_length), soft_wrap=True)
        for number, each in enumerate(found[: config.rows], start=1):
            if isinstance(each, Datum):
                console.rule(f"{number}: {len(each.tokens)} tokens, {_learned(each)} learned", align="left")
                console.print(coloured(each, chosen.tokenizer))
            else:
                console.rule(f"{number}: left out", align="left")
                console.print(each, markup=False)
        console.print()
    return 0


def _kinds(config: PreviewConfig) -> list[Kind]:
    if config.kind != "auto":
        return [config.kind]
    if config.data == "builtin":  # which has a file of either
        return ["conversations", "comparisons"]
    return ["comparisons" if gives_comparisons(config.data) else "conversations"]


def _load(kind: Kind, config: PreviewConfig) -> Loaded[Any]:
    loaders: dict[Kind, Callable[..., Loaded[Any]]] = {
        "conversations": data.load_conversations,
        "comparisons": data.load_comparisons,
        "prompts": data.load_prompts,
    }
    return loaders[kind](config.data, split=config.split, skip_bad_rows=config.skip_bad_rows)


def _maker(kind: Kind, renderer: Renderer, config: PreviewConfig) -> Callable[[Any], Datum]:
    """From a row to what is learned of it."""
    if kind == "comparisons":
        return ComparisonRenderer(renderer, config.max_length).datum
    if kind == "prompts":
        return lambda row: _given(renderer.generation_prompt(row))
    return lambda row: renderer.datum(row, train_on=config.train_on, limit=config.max_length)


def _given(tokens: list[int]) -> Datum:
    return Datum(tokens, [0.0] * len(tokens))


def _datum(make: Callable[[Any], Datum], row: object) -> Datum | str:
    """What is learned, or why the row is left out."""
    try:
        return make(row)
    except DataError as error:
        return str(error)


def _counts(found: Sequence[Datum | str], max_length: int) -> str:
    data_ = [each for each in found if isinstance(each, Datum)]
    left_out = len(found) - len(data_)
    line = f"of the first {len(found):,}"
    if data_:
        lengths, learned = [len(each.tokens) for each in data_], [_learned(each) for each in data_]
        line += (
            f": {statistics.fmean(lengths):.0f} tokens on average, {max(lengths):,} at most, "
            f"{statistics.fmean(learned):.0f} of them learned"
        )
    return line + (f"; {left_out} do not fit into {max_length} tokens or cannot be learned" if left_out else "")


def _learned(datum: Datum) -> int:
    return sum(weight != 0 for weight in datum.weights)
