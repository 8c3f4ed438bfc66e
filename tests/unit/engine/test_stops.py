"""What ends a completion, and that hardly any text is decoded to find it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tercet.engine.fake import letters
from tercet.engine.sampler import Stops
from tercet.models.tiny import _byte_pairs

LIMIT = 40
# ▁ stands for a space, and what is in no token is spelled in bytes, as in sentencepiece models.
PIECES = ["▁", "▁▁", "a", "b", "ab", "▁a", "▁b", "▁ab", "b▁", ".", "\n", "\n\n", "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(*decoder: decoders.Decoder) -> Tokenizer:
    vocabulary = {piece: token for token, piece in enumerate([*PIECES, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(list(decoder))
    return tokenizer


def words(decoder: decoders.Decoder | None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "##a": 3, "##b": 4, "a b": 5, ".": 6}, "[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


SPACED = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
TOKENIZERS = {
    "byte pairs": _byte_pairs(),
    "sentencepiece that keeps the first space": sentencepiece(*SPACED),
    "sentencepiece without the first space": sentencepiece(*SPACED, decoders.Strip(" ", 1, 0)),
    "words with spaces between": words(None),
    "words and their endings": words(decoders.WordPiece(cleanup=False)),
}


def units(name: str) -> list[list[int]]:
    """What texts are made of: tokens, and characters that take several."""
    tokenizer = TOKENIZERS[name]
    if name == "byte pairs":
        return [[token] for token in range(tokenizer.get_vocab_size())] + [tokenizer.encode(c).ids for c in "é中🙂"]
    if name.startswith("sentencepiece"):
        characters = [[len(PIECES) + byte for byte in character.encode()] for character in "中🙂\n"]
        return [[token] for token in range(len(PIECES))] + characters
    return [[token] for token in range(tokenizer.get_vocab_size())]


def always_decoded(stops: Stops, tokens: list[int]) -> str | None:
    """The rule itself: after every token the end of the text is decoded."""
    if tokens[-1] in stops.tokens:
        return "stop"
    window = 4 * max(map(len, stops.strings)) + 4
    if any(string in stops.decode(tokens[-window:]) for string in stops.strings):
        return "stop"
    return "eos" if tokens[-1] in stops.eos else "length" if len(tokens) >= LIMIT else None


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_completion_ends_where_it_would_if_every_text_were_decoded(name, data):
    def decode(tokens: list[int]) -> str:
        text: str = TOKENIZERS[name].decode(tokens, skip_special_tokens=False)
        return text

    few = data.draw(st.lists(st.sampled_from(units(name)), min_size=1, max_size=6))
    drawn = data.draw(st.lists(st.sampled_from(few), min_size=1, max_size=LIMIT))
    tokens = [token for unit in drawn for token in unit][:LIMIT]
    text = decode(tokens)
    strings = st.integers(0, len(text)).flatmap(lambda at: st.integers(1, 9).map(lambda n: text[at : at + n] or "a"))
    stop = tuple(data.draw(st.lists(strings | st.text("ab .\n'�é", min_size=1, max_size=3), min_size=1, max_size=2)))
    stops = Stops(frozenset(tokens[:1]) if data.draw(st.booleans()) else frozenset(), stop, frozenset({2}), decode)
    for end in range(1, len(tokens) + 1):
        wanted = always_decoded(stops, tokens[:end])
        assert stops.reason(tokens[:end], LIMIT) == wanted
        asked = stops.candidates(np.array([tokens[end - 1]]), np.array([end]), LIMIT)
        assert asked == [0] or wanted is None
        if wanted is not None:
            break


def test_a_byte_that_spoils_a_character_ends_at_a_stop_string_of_such():
    def decode(tokens: list[int]) -> str:
        return TOKENIZERS["sentencepiece that keeps the first space"].decode(tokens)

    tokens = [len(PIECES) + byte for byte in (0xF0, 0x0A)]
    assert [decode(tokens[1:]), decode(tokens)] == ["\n", "��"]
    stops = Stops(frozenset(), ("��",), frozenset(), decode)
    assert [stops.reason(tokens[:1], LIMIT), stops.reason(tokens, LIMIT)] == [None, "stop"]


def test_only_rows_that_may_have_ended_are_looked_at():
    stops = Stops(frozenset({7}), (), frozenset({2}), letters)
    assert stops.candidates(np.array([7, 5, 2, 6]), np.array([1, 1, 1, 4]), limit=4) == [0, 2, 3]
    # Tokens spell a, b, c ...; of "abc" only its end matters, and a space may stand before any word.
    for string, wanted in (("abc", [2]), ("a", [0]), ("b ", [0, 1, 2, 3]), ("xd", [3])):
        stops = Stops(frozenset(), (string,), frozenset(), letters)
        assert stops.candidates(np.array([0, 1, 2, 3]), np.array([1, 1, 1, 1]), limit=4) == wanted


def test_a_text_is_decoded_only_after_tokens_in_which_a_stop_string_may_end():
    decoded: list[list[int]] = []

    def decode(tokens: list[int]) -> str:
        decoded.append(tokens)
        return letters(tokens)

    stops = Stops(frozenset(), ("bcd",), frozenset(), decode)
    row = [0, 1, 2, 1, 0, 3, 1, 2, 3]
    assert [stops.reason(row[:end], 99) for end in range(1, 10)] == [None] * 8 + ["stop"]
    assert [tokens for tokens in decoded if len(tokens) > 2] == [row[:6], row]  # after both d's
    assert len(decoded) == 2 + 2 * 4  # and each of four tokens once, alone and twice
