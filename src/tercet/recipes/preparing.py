"""From a file of scored answers to a folder of pairs, with an account of what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tercet.algorithms.prepare import Prepared, Select, SelectionConfig, prepare
from tercet.chat.renderers import Renderer, renderer
from tercet.config import to_mapping
from tercet.data.groups import RankedPair, load_groups
from tercet.errors import UsageError
from tercet.recipes.row_files import write_whole
from tercet.recipes.session import Say, settings_of
from tercet.runs.durable import beside, sync, write_atomically
from tercet.types import Conversation, Message, as_messages

Kind = Literal["jsonl", "parquet"]
ACCOUNT = "prepared.yaml"
"""In the folder: how it was made, and what each filter left out."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SelectionConfig):
    """Make pairs of scored answers, or of the best answers rows to fine-tune on."""

    data: str
    """Scored answers, as tercet score writes them, or with columns prompt, response_0, response_0_reward and so on."""
    split: str = "train"
    """The split of the data."""
    out: Path
    """A folder, which must not exist: train and test rows, and an account of what was left out."""
    kind: Kind = "jsonl"
    """Kind of the files: jsonl or parquet."""
    seed: int = 0
    """Of the test split."""
    model: str | None = None
    """Whose tokenizer makes tokens of answers that come as text alone; answers of tercet generate bring theirs."""
    renderer: str = "auto"
    """How those become tokens: chat_template, role_colon, or auto."""


def prepare_file(config: PrepareConfig, *, say: Say = print) -> Path:
    """Filter, pair and split. Returns the folder.

    Raises:
        UsageError: The folder exists, or an answer has no tokens and no model is named.
    """
    if config.out.exists():
        raise UsageError(f"{config.out} exists, and nothing is overwritten; name another folder with --out")
    chosen: list[Renderer] = []

    def tokenised(prompt: Conversation, words: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if config.model is None:
            raise UsageError(
                f"{config.data} has prompts or answers without tokens; give --model, whose tokenizer makes them of text"
            )
        if not chosen:
            from tercet.models.load import load_tokenizer

            say(f"what comes without tokens gets those of {config.model}'s tokenizer")
            chosen.append(renderer(config.renderer, load_tokenizer(config.model)))
        return tokens_of(chosen[0], prompt, words)

    groups = load_groups(config.data, split=config.split)
    prepared = prepare(config, groups, tokenised, seed=config.seed)
    for line in prepared.describe():
        say(line)
    made_of = {**settings_of(SelectionConfig, config), "data": config.data, "seed": config.seed}
    write_prepared(prepared, config.out, select=config.select, kind=config.kind, made_of=made_of)
    return config.out


def tokens_of(chosen: Renderer, prompt: Conversation, words: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a prompt and of an answer that is known as text alone, up to the end of what is learned: its stop."""
    asked = tuple(chosen.generation_prompt(prompt))
    whole = chosen.datum((*prompt, Message("assistant", words)), train_on="last_assistant_message")
    end = max(place for place, weight in enumerate(whole.weights, start=1) if weight)
    return asked, tuple(whole.tokens[len(asked) : end])


def drawn_at(place: str) -> list[float]:
    """At which temperatures prepared answers were drawn, as the account beside them says; nothing where there is none.

    Args:
        place: The folder that `write_prepared` wrote, or a file in it.
    """
    folder = Path(place).parent if Path(place).is_file() else Path(place)
    account = yaml.safe_load((folder / ACCOUNT).read_text()) if (folder / ACCOUNT).is_file() else None
    return list(account.get("temperatures") or ()) if isinstance(account, dict) else []


def write_prepared(
    prepared: Prepared, out: Path, *, select: Select, kind: Kind = "jsonl", made_of: Mapping[str, Any]
) -> None:
    """Write the folder: it is there whole, or not at all."""
    folder = beside(out)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in (("train", prepared.train), ("test", prepared.test)):
        if pairs:
            write_whole(folder / f"{split}.{kind}", (_row(pair, select) for pair in pairs))
    counts = {"left_out": prepared.dropped, "kept": {"train": len(prepared.train), "test": len(prepared.test)}}
    account = to_mapping({**made_of, "temperatures": prepared.temperatures, **counts})
    write_atomically(folder / ACCOUNT, yaml.safe_dump(account, sort_keys=False, allow_unicode=True))
    folder.rename(out)
    sync(out.parent)


def _row(pair: RankedPair, select: Select) -> dict[str, Any]:
    if select != "best":
        return pair.row()
    return {"messages": as_messages((*pair.prompt, *pair.chosen.conversation)), "reward": pair.chosen.reward}
