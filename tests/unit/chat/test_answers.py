from __future__ import annotations

import pytest

from tercet.chat.answers import AnswerRenderer
from tercet.chat.renderers import renderer
from tercet.errors import DataError
from tercet.models.load import load_tokenizer
from tercet.types import Message

PROMPT = (Message("user", "One, two, three, four?"),)
ANSWER = (Message("assistant", "Five."),)


def text(tokens):
    return load_tokenizer("tiny").decode(list(tokens))


def shown(name, limit=512):
    return AnswerRenderer(renderer(name, load_tokenizer("tiny")), limit)


@pytest.mark.parametrize("name", ["chat_template", "role_colon"])
def test_prompt_and_answer_are_a_conversation_that_is_over(name):
    tokens = shown(name).tokens(PROMPT, ANSWER)
    prompt = shown(name).renderer.generation_prompt(PROMPT)
    assert tokens[: len(prompt)] == tuple(prompt)
    ends = {"chat_template": "Five.<|im_end|>\n", "role_colon": "Five.\n\nUser:"}
    assert text(tokens[len(prompt) :]).lstrip() == ends[name]


def test_what_a_template_writes_is_what_is_scored():
    tokenizer = load_tokenizer("tiny")
    turns = [{"role": m.role, "content": m.content} for m in (*PROMPT, *ANSWER)]
    assert text(shown("chat_template").tokens(PROMPT, ANSWER)) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_long_prompt_loses_its_beginning():
    whole = shown("role_colon").tokens(PROMPT, ANSWER)
    cut = shown("role_colon", limit=len(whole) - 3).tokens(PROMPT, ANSWER)
    first = int(whole[0] == load_tokenizer("tiny").bos_token_id)
    assert cut == whole[:first] + whole[first + 3 :]


def test_an_answer_that_alone_is_too_long_is_refused():
    with pytest.raises(DataError, match="the limit is 4"):
        shown("role_colon", limit=4).tokens(PROMPT, ANSWER)
