"""A datum as a person reads it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from tercet.chat.encoding import Tokenizer, text_of
from tercet.types import Datum

if TYPE_CHECKING:
    from rich.text import Text

LEARNED_STYLE = "bold green"
GIVEN_STYLE = "dim"


def coloured(datum: Datum, tokenizer: Tokenizer) -> Text:
    """The decoded tokens, special ones written out: learned ones bold green, the others dim."""
    from rich.text import Text

    text = Text()
    for learned, run in groupby(zip(datum.tokens, datum.weights, strict=True), key=lambda pair: pair[1] != 0):
        text.append(text_of(tokenizer, [token for token, _ in run]), style=LEARNED_STYLE if learned else GIVEN_STYLE)
    return text
