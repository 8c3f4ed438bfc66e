"""The files of AlpacaEval, MT-Bench and Arena-Hard: their questions read, a policy's answers written as they read them.

::

    alpaca-eval   instruction                      -> instruction, output, generator                       one json list
    mt-bench      question_id, category, turns     -> question_id, answer_id, model_id, choices            jsonl
    arena-hard    uid, prompt                      -> uid, ans_id, model, messages, metadata               jsonl

MT-Bench and Arena-Hard take a model's name from the file's; so does the generator here, and the file's name is the
policy's. Where these tools note the time, there is a 0: a file is a function of weights, questions and seed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tercet.data import load_prompts
from tercet.data.files import Unreadable
from tercet.data.sources import open_source
from tercet.data.turns import BadRow, Row, integer, need, text
from tercet.errors import DataError

Format = Literal["alpaca-eval", "mt-bench", "arena-hard"]
CATEGORY_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Of MT-Bench, from FastChat's `llm_judge`."""


@dataclass(frozen=True)
class Asked:
    """A benchmark's question: what the user says, turn by turn, and what the answer's row repeats of it."""

    turns: tuple[str, ...]
    about: Row
    temperature: float | None = None
    """What the benchmark draws its answer at; None where it says nothing."""


@dataclass(frozen=True)
class Told:
    """An answer: its words, and its length in the policy's tokens."""

    words: str
    tokens: int


@dataclass(frozen=True)
class Export:
    """One tool's files."""

    read: Callable[[Row], Asked]
    write: Callable[[Asked, Sequence[Told], str], dict[str, Any]]
    suffix: str
    max_tokens: int
    """Longest answer, as the tool's own configs have it."""
    temperature: float
    """Where the question has none of its own."""
    wants: str
    """A row of questions in words."""


def _read_alpaca(row: Row) -> Asked:
    if row.get("input"):
        raise BadRow("'input' beside 'instruction'; AlpacaEval knows an instruction alone")
    return Asked((text(row, "instruction"),), {name: row[name] for name in ("instruction", "dataset") if name in row})


def _write_alpaca(asked: Asked, answers: Sequence[Told], name: str) -> dict[str, Any]:
    return {**asked.about, "output": answers[0].words, "generator": name}


def _read_mt_bench(row: Row) -> Asked:
    turns = need(row, "turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BadRow("'turns' must be a list of texts")
    temperature = CATEGORY_TEMPERATURES.get(text(row, "category"))
    return Asked(tuple(turns), {"question_id": integer(row, "question_id")}, temperature)


def _write_mt_bench(asked: Asked, answers: Sequence[Told], name: str) -> dict[str, Any]:
    return {
        **asked.about,
        "answer_id": _id(asked, name),
        "model_id": name,
        "choices": [{"index": 0, "turns": [answer.words for answer in answers]}],
        "tstamp": 0.0,
    }


def _read_arena_hard(row: Row) -> Asked:
    return Asked((text(row, "prompt"),), {"uid": text(row, "uid")})


def _write_arena_hard(asked: Asked, answers: Sequence[Told], name: str) -> dict[str, Any]:
    [answer] = answers
    return {
        **asked.about,
        "ans_id": _id(asked, name),
        "model": name,
        "messages": [
            {"role": "user", "content": asked.turns[0]},
            {"role": "assistant", "content": {"answer": answer.words}},
        ],
        "tstamp": 0.0,
        "metadata": {"token_len": answer.tokens, **markdown_counts(answer.words)},
    }


EXPORTS: dict[Format, Export] = {
    "alpaca-eval": Export(
        read=_read_alpaca,
        write=_write_alpaca,
        suffix=".json",
        max_tokens=2048,
        temperature=0.7,
        wants="instruction: text",
    ),
    "mt-bench": Export(
        read=_read_mt_bench,
        write=_write_mt_bench,
        suffix=".jsonl",
        max_tokens=1024,
        temperature=0.7,
        wants="question_id: number, category: text, turns: list of texts",
    ),
    "arena-hard": Export(
        read=_read_arena_hard,
        write=_write_arena_hard,
        suffix=".jsonl",
        max_tokens=4096,
        temperature=0.0,
        wants="uid: text, prompt: text",
    ),
}
"""Name -> how its files are read and written."""


@dataclass(frozen=True)
class Questions:
    """What a benchmark asks, and how many rows were left out."""

    rows: list[Asked]
    left_out: int


def load_questions(
    export: Format, source: str, *, split: str, rows: int | None, skip_bad_rows: bool = False
) -> Questions:
    """The questions of a benchmark, in order.

    For alpaca-eval, prompts of any shape will do whose first row has no instruction: their single turns are the
    instructions.

    Args:
        export: The tool.
        source: "builtin", a hub id, a directory or a file.
        split: Of the source.
        rows: At most so many.
        skip_bad_rows: Leave out and count what cannot be used, instead of failing at the first.

    Raises:
        DataError: A row is none of this benchmark's, or there is none; names the row.
    """
    kind = EXPORTS[export]
    found: list[Asked] = []
    left_out = 0
    for where, row in _rows(export, source, split, skip_bad_rows):
        if rows is not None and len(found) == rows:
            break
        try:
            if isinstance(row, Unreadable):
                raise BadRow(row.reason)
            found.append(kind.read(row))
        except BadRow as error:
            if not skip_bad_rows:
                raise DataError(
                    f"{where}: {error}. A question of {export} is {kind.wants}; mend the row, or pass --skip-bad-rows "
                    "to leave out and count such rows"
                ) from error
            left_out += 1
    if not found:
        raise DataError(f"{source} ({split}) has no question of {export}: {kind.wants}")
    return Questions(found, left_out)


def _rows(export: Format, source: str, split: str, skip_bad_rows: bool) -> Iterator[tuple[str, Row | Unreadable]]:
    opened = open_source(source, split=split, purpose="prompts")
    first = next(opened.rows, None)
    if first is None:
        return
    if export != "alpaca-eval" or (not isinstance(first[1], Unreadable) and "instruction" in first[1]):
        yield first
        yield from opened.rows
        return
    for i, prompt in enumerate(load_prompts(source, split=split, skip_bad_rows=skip_bad_rows).rows, start=1):
        single = len(prompt) == 1 and prompt[0].role == "user"
        row = {"instruction": prompt[0].content} if single else Unreadable("a prompt of several turns")
        yield f"{source} ({split}): prompt {i}", row


def markdown_counts(words: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold phrases outside of code blocks, under the names Arena-Hard's style control reads.

    >>> markdown_counts("# A\\n- b\\n**c**\\n```\\n# d\\n```")["header_count"]["h1"]
    1
    """
    plain = re.sub(r"```[^`]*```", "", words)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _id(asked: Asked, name: str) -> str:
    return hashlib.sha256(f"{name}\n{asked.about}".encode(errors="surrogatepass")).hexdigest()[:22]
