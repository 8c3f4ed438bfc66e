from __future__ import annotations

from tercet.chat.preview import GIVEN_STYLE, LEARNED_STYLE, coloured
from tercet.chat.renderers import renderer
from tercet.types import Message


def test_learned_text_is_coloured_and_the_rest_is_dim(tokenizers):
    conversation = (Message("user", "Hi"), Message("assistant", "Hello. [bold]é😀"))
    datum = renderer("chat_template", tokenizers["chatml"]).datum(conversation)
    text = coloured(datum, tokenizers["chatml"])
    assert text.plain == tokenizers["chatml"].decode(datum.tokens)
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans][1:] == [
        ("Hello. [bold]é😀<|im_end|>", LEARNED_STYLE),
        ("\n", GIVEN_STYLE),
    ]
