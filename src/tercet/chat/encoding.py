"""Text to token ids, piece by piece. What is tokenised apart when sampling is tokenised apart when training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

CACHED_PIECES = 8192


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, of transformers 4 or 5."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that opens a text, where there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, where there is one."""

    @property
    def chat_template(self) -> Any:
        """Jinja source, several of them by name, or nothing."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens found in a text before anything else, the special ones among them."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> Any:
        """The text of token ids."""

    def get_chat_template(self) -> str:
        """The Jinja source in use."""
        ...

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any:
        """A conversation as the template writes it."""


class Encoder:
    """Token ids of a piece of a longer text, without BOS or EOS.

    SentencePiece-like tokenizers write a space before whatever they are given; in the middle of a text that space is
    not there. For those, a piece that is not the first is encoded behind a special token, which is then taken off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out whether the tokenizer writes such spaces."""
        self.tokenizer = tokenizer
        self._anchor, self._anchor_id = self._needed_anchor()
        # The answers of a tournament come back in n(n-1) comparisons: each is tokenised once.
        self._cached = lru_cache(maxsize=CACHED_PIECES)(self._encode)

    def __call__(self, text: str, *, first: bool = False) -> tuple[int, ...]:
        """Token ids of `text`; `first` says that nothing but special tokens stands before it."""
        return self._cached(text, first)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, text: str, first: bool) -> tuple[int, ...]:
        if not text:
            return ()
        if first or self._anchor is None:
            return tuple(self._plain(text))
        tokens = self._plain(self._anchor + text)
        # A special token may be made to swallow the white space after it; it is still one token.
        assert tokens[0] == self._anchor_id
        return tuple(tokens[1:])

    def _needed_anchor(self) -> tuple[str | None, int | None]:
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is None:
                continue
            anchor = text_of(self.tokenizer, [token])
            behind = self._plain(anchor + "x")
            if behind[:1] == [token] and behind[1:] != self._plain("x"):
                return anchor, token
        return None, None


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], *, special: bool = True) -> str:
    """Decoded text, with the special tokens written out (`special`) or left out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not special))
