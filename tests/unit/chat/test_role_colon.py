from __future__ import annotations

from typing import Any

import pytest

from tercet.chat.role_colon import RoleColon
from tercet.types import Datum, Message

CONVERSATION = (
    Message("user", "Hi"),
    Message("assistant", "Hello."),
    Message("user", "Joke?"),
    Message("assistant", "Knock."),
)


def runs(datum: Datum, tokenizer: Any) -> list[tuple[str, float]]:
    """Decoded text with its weight, joined where the weight stays the same."""
    joined: list[tuple[list[int], float]] = []
    for token, weight in zip(datum.tokens, datum.weights, strict=True):
        if joined and joined[-1][1] == weight:
            joined[-1][0].append(token)
        else:
            joined.append(([token], weight))
    return [(tokenizer.decode(tokens), weight) for tokens, weight in joined]


def test_answers_are_learned_and_the_last_one_with_the_next_users_header(tokenizers):
    datum = RoleColon(tokenizers["no_bos"]).datum(CONVERSATION)
    assert runs(datum, tokenizers["no_bos"]) == [
        ("User: Hi\n\nAssistant:", 0.0),
        (" Hello.\n\n", 1.0),
        ("User: Joke?\n\nAssistant:", 0.0),
        (" Knock.\n\nUser:", 1.0),
    ]


def test_the_overlap_is_left_out_where_the_last_message_is_not_learned(tokenizers):
    tokenizer = tokenizers["no_bos"]
    users = RoleColon(tokenizer).datum(CONVERSATION, train_on="all_user_and_system_messages")
    assert runs(users, tokenizer)[-1] == ("Assistant: Knock.\n\n", 0.0)
    followed = RoleColon(tokenizer).datum(CONVERSATION[:3])
    assert runs(followed, tokenizer)[-1] == ("User: Joke?\n\n", 0.0)


def test_headers_and_outputs_are_tokenised_apart(tokenizers):
    tokenizer = tokenizers["chatml"]
    render = RoleColon(tokenizer)
    pieces = ["User:", " Hi\n\n", "Assistant:", " \n\nHello\n\n\n", "User:"]
    expected = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    conversation = (Message("user", "Hi"), Message("assistant", "\n\nHello\n"))
    assert list(render.datum(conversation).tokens) == [tokenizer.bos_token_id, *expected]


def test_the_prompt_ends_in_the_assistants_header_without_a_space(tokenizers):
    prompt = RoleColon(tokenizers["no_bos"]).generation_prompt(CONVERSATION[:1])
    assert tokenizers["no_bos"].decode(prompt) == "User: Hi\n\nAssistant:"


def test_the_prompt_to_nothing_is_the_assistants_header(tokenizers):
    prompt = RoleColon(tokenizers["no_bos"]).generation_prompt(())
    assert tokenizers["no_bos"].decode(prompt) == "Assistant:"


@pytest.mark.parametrize(
    ("text", "content", "ended"),
    [
        (" Hello.\n\nUser:", "Hello.", "stop"),
        ("  Hello.\n\n\n\nUser:", " Hello.\n\n", "stop"),
        (" One.\n\nTwo.\n\nUser:", "One.\n\nTwo.", "stop"),
        ("Hello.\n\nUser:", "Hello.", "stop"),
        (" Hello.<|endoftext|>", "Hello.", "eos"),
        (" Hello.\n\n<|endoftext|>", "Hello.", "eos"),
        (" Hello.", "Hello.", "malformed"),
        (" Hello.\n\nUser", "Hello.\n\nUser", "malformed"),
        (" Hello.\n\nUser: Hi\n\nUser:", "Hello.", "malformed"),
        (" Hello.\n\nUser:<|endoftext|>", "Hello.", "malformed"),
        (" Hello.<|endoftext|> there", "Hello. there", "malformed"),
        ("\n\nUser:", "", "stop"),
        ("<|endoftext|>", "", "eos"),
    ],
)
def test_answers_are_parsed_by_how_they_end(tokenizers, text, content, ended):
    tokenizer = tokenizers["no_bos"]
    message, termination = RoleColon(tokenizer).parse(tokenizer.encode(text))
    assert (message.content, termination) == (content, ended)


def test_the_stop_may_span_tokens_in_any_way(tokenizers):
    tokenizer = tokenizers["no_bos"]
    render = RoleColon(tokenizer)
    for pieces in ([" Hello.", "\n", "\nUs", "er:"], [" Hello.\n", "\nUser", ":"], list(" Hello.\n\nUser:")):
        tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
        assert render.parse(tokens) == (Message("assistant", "Hello."), "stop")
