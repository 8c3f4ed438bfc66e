"""The shapes rows come in: one table, read from the top; the first that fits is taken.

To add a shape, write a function from a row to conversations or comparisons in ``rows`` and one entry of `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tercet.data.rows import (
    alpaca,
    alpaca_comparison,
    chosen_rejected,
    helpsteer3,
    hh,
    labelled_completion,
    messages_row,
    pandalm,
    prompt_chosen_reject,
    prompt_chosen_rejected,
    prompt_completion,
    prompt_row,
    self_instruct,
    sharegpt,
    sharegpt_ranking,
)
from tercet.data.trees import tree_comparisons, tree_conversations
from tercet.data.turns import HH_TURN, BadRow, Dropped, Row
from tercet.types import Comparison, Conversation, LabelledAnswer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How rows of one kind are recognised and read. A shape without conversations gives those of its better answers."""

    name: str
    columns: tuple[str, ...]
    """All must be there; others may be."""
    only_if: Callable[[Row], bool] = lambda row: True
    looks: str
    """The shape in words, for messages and documentation."""
    conversations: Callable[[Row], Iterable[Conversation | Dropped]] | None = None
    comparisons: Callable[[Row], Iterable[Comparison | Dropped]] | None = None
    prompts: Callable[[Row], Iterable[Conversation | Dropped]] | None = None
    labelled: Callable[[Row], Iterable[LabelledAnswer | Dropped]] | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row has this shape, by its columns."""
        return all(column in row for column in self.columns) and self.only_if(row)


def _is_tree(row: Row) -> bool:
    return isinstance(row["prompt"], Mapping) and "replies" in row["prompt"]


def _is_hh(row: Row) -> bool:
    return isinstance(row["chosen"], str) and HH_TURN in row["chosen"]


SHAPES = (
    Shape(
        name="oasst trees",
        columns=("prompt",),
        only_if=_is_tree,
        looks="prompt: {text, role, replies: [{text, role, rank, replies}]}",
        conversations=tree_conversations,
        comparisons=tree_comparisons,
    ),
    Shape(
        name="HelpSteer3",
        columns=("context", "response1", "response2", "overall_preference"),
        looks="context: turns, response1 and response2: text, overall_preference: -3 (first better) to 3",
        comparisons=helpsteer3,
    ),
    Shape(
        name="PandaLM",
        columns=("instruction", "response1", "response2", "annotator1"),
        looks="instruction, input, response1, response2: text, annotator1…: 0 (tie), 1 or 2",
        comparisons=pandalm,
    ),
    Shape(
        name="sharegpt ranking",
        columns=("conversations", "chosen", "rejected"),
        looks="conversations: [{from, value}] ending with the human, chosen and rejected: {from, value}",
        comparisons=sharegpt_ranking,
    ),
    Shape(
        name="sharegpt",
        columns=("conversations",),
        looks="conversations: [{from: system, human or gpt, value}]",
        conversations=sharegpt,
    ),
    Shape(
        name="instruction preferences",
        columns=("instruction", "chosen", "rejected"),
        looks="instruction, input, chosen, rejected: text",
        comparisons=alpaca_comparison,
    ),
    Shape(
        name="self-instruct",
        columns=("instruction", "instances"),
        looks="instruction: text, instances: [{input, output}]",
        conversations=self_instruct,
    ),
    Shape(
        name="alpaca",
        columns=("instruction", "output"),
        looks="instruction, input, output: text; system: text and history: pairs where given",
        conversations=alpaca,
    ),
    Shape(
        name="UltraFeedback binarised",
        columns=("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
        looks="prompt: text, chosen and rejected: turns that repeat it, score_chosen, score_rejected",
        comparisons=prompt_chosen_rejected,
    ),
    Shape(
        name="prompt/chosen/rejected",
        columns=("prompt", "chosen", "rejected"),
        looks="prompt, chosen, rejected: each text or turns",
        comparisons=prompt_chosen_rejected,
    ),
    Shape(
        name="REBEL pairs",
        columns=("prompt", "chosen", "reject"),
        looks="prompt, chosen, reject: each text or turns; chosen_reward and reject_reward where given",
        comparisons=prompt_chosen_reject,
    ),
    Shape(
        name="raw HH",
        columns=("chosen", "rejected"),
        only_if=_is_hh,
        looks="chosen and rejected: dialogues as text, '\\n\\nHuman: … \\n\\nAssistant: …'",
        comparisons=hh,
    ),
    Shape(
        name="chosen/rejected",
        columns=("chosen", "rejected"),
        looks="chosen and rejected: each text or turns, beginning with the same prompt",
        comparisons=chosen_rejected,
    ),
    Shape(
        name="No Robots",
        columns=("messages", "prompt_id", "category"),
        looks="messages: [{role, content}], prompt_id, category",
        conversations=messages_row,
    ),
    Shape(
        name="messages",
        columns=("messages",),
        looks="messages: [{role: system, user or assistant, content}]",
        conversations=messages_row,
    ),
    Shape(
        name="prompt/completion",
        columns=("prompt", "completion"),
        looks="prompt, completion: each text or turns; label: true or false where answers are labelled",
        conversations=prompt_completion,
        labelled=labelled_completion,
    ),
    Shape(name="prompt", columns=("prompt",), looks="prompt: text or turns; nothing to learn from", prompts=prompt_row),
)
"""Every shape, in the order in which they are tried."""


def recognise(row: Row) -> Shape:
    """The shape of a row.

    Raises:
        BadRow: None fits.
    """
    for shape in SHAPES:
        if shape.fits(row):
            return shape
    raise BadRow("no known shape has these columns")
