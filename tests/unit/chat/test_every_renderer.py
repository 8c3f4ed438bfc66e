"""What every renderer promises, on every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.chat.renderers import TRAIN_ON, Renderer, renderer
from tercet.errors import ConfigError, DataError, ModelError
from tercet.types import Message


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


TWO_TURNS = (user("Hi"), assistant("Hello."), user("Tell me a joke"), assistant("Knock knock.\n\nWho is there?"))
# White space where headers end and contents begin is where tokens would merge.
AWKWARD = (user("\n Hi\n\n"), assistant("\n\nHello.\n"), user(" "), assistant(" é😀\n\n"))

ALL = ["chatml", "llama3", "generation", "strict", "deaf", "words", "metaspace"]
KINDS = [("chat_template", name) for name in ALL] + [
    ("role_colon", name) for name in ("chatml", "llama3", "metaspace", "no_template", "no_bos", "no_special")
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def render(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Renderer:
    name, tokenizer = request.param
    return renderer(name, tokenizers[tokenizer])


def learned_text(render: Renderer, tokens: Any, weights: Any) -> str:
    return str(
        render.tokenizer.decode([t for t, w in zip(tokens, weights, strict=True) if w], skip_special_tokens=False)
    )


@pytest.mark.parametrize("conversation", [TWO_TURNS, TWO_TURNS[:2], AWKWARD], ids=["two turns", "one turn", "awkward"])
@pytest.mark.parametrize("train_on", ["all_assistant_messages", "last_assistant_message", "all_tokens"])
def test_training_begins_with_exactly_the_generation_prompt(render, conversation, train_on):
    tokens = list(render.datum(conversation, train_on=train_on).tokens)
    for i, message in enumerate(conversation):
        if message.role == "assistant":
            prompt = render.generation_prompt(conversation[:i])
            assert tokens[: len(prompt)] == prompt
            assert len(tokens) > len(prompt)


def test_the_generation_prompt_is_not_learned_and_the_answer_after_it_is(render):
    datum = render.datum(TWO_TURNS, train_on="last_assistant_message")
    prompt = len(render.generation_prompt(TWO_TURNS[:-1]))
    assert not any(datum.weights[:prompt])
    assert datum.weights[prompt] == 1.0


def test_what_is_learned_is_each_answer_and_its_stop(render):
    datum = render.datum(TWO_TURNS)
    runs: list[list[int]] = []
    previous = 0.0
    for token, weight in zip(datum.tokens, datum.weights, strict=True):
        if weight:
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = weight
    assert len(runs) == 2
    endings = [stop if isinstance(stop, str) else render.tokenizer.decode([stop]) for stop in render.stop]
    for run, message in zip(runs, (TWO_TURNS[1], TWO_TURNS[3]), strict=True):
        text = render.tokenizer.decode(run, skip_special_tokens=False).strip(" ")
        assert text.startswith(message.content)
        ending = text.removeprefix(message.content)
        # role_colon: an answer in the middle learns the first half of its stop; the header that follows is the second.
        assert ending in endings or (render.name == "role_colon" and ending == "\n\n")


def test_a_learned_answer_is_parsed_back(render):
    datum = render.datum(TWO_TURNS)
    sampled = datum.tokens[len(render.generation_prompt(TWO_TURNS[:-1])) :]
    sampled = [t for t, w in zip(sampled, datum.weights[-len(sampled) :], strict=True) if w]
    assert render.parse(sampled) == (TWO_TURNS[-1], "stop")


def test_a_cut_answer_is_malformed_and_keeps_its_words(render):
    prompt = len(render.generation_prompt(TWO_TURNS[:-1]))
    sampled = render.datum(TWO_TURNS).tokens[prompt : prompt + 2]
    message, ended = render.parse(sampled)
    assert ended == "malformed"
    assert message.content and TWO_TURNS[-1].content.startswith(message.content)


def test_no_tokens_are_an_empty_malformed_answer(render):
    assert render.parse([]) == (Message("assistant", ""), "malformed")


def test_no_token_is_none_and_bos_comes_once_and_only_where_it_belongs(render):
    bos = render.tokenizer.bos_token_id
    tokens = list(render.datum(TWO_TURNS).tokens)
    prompt = render.generation_prompt(TWO_TURNS)
    assert all(isinstance(token, int) for token in tokens + prompt)
    if bos is not None and render.tokenizer.decode([bos]) != "<|im_start|>":
        assert tokens.count(bos) == prompt.count(bos) == 1
        assert tokens[0] == prompt[0] == bos
    if render.name == "role_colon":
        assert tokens.count(bos) == (bos is not None)


def test_the_prompt_is_a_plain_list_of_ints(render):
    prompt = render.generation_prompt(TWO_TURNS[:1])
    assert type(prompt) is list and all(type(token) is int for token in prompt)


@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_the_first_token_is_never_learned(render, train_on):
    marked = tuple(Message(m.role, m.content, trainable=True) for m in TWO_TURNS)
    assert render.datum(marked, train_on=train_on).weights[0] == 0


def test_train_on_chooses_messages(render):
    chosen = tuple(Message(m.role, m.content, trainable=i == 2) for i, m in enumerate(TWO_TURNS))
    texts = {
        train_on: learned_text(render, datum.tokens, datum.weights)
        for train_on in TRAIN_ON
        for datum in [render.datum(chosen, train_on=train_on)]
    }
    said = {name: [m.content in text for m in TWO_TURNS] for name, text in texts.items()}
    assert said == {
        "all_assistant_messages": [False, True, False, True],
        "last_assistant_message": [False, False, False, True],
        "last_assistant_turn": [False, False, False, True],
        "all_messages": [True] * 4,
        "all_tokens": [True] * 4,
        "all_user_and_system_messages": [True, False, True, False],
        "customized": [False, False, True, False],
    }
    assert len(texts["all_tokens"]) > len(texts["all_messages"])


def test_a_conversation_without_a_learned_token_is_named(render):
    with pytest.raises(DataError, match=r"'Hi'.*no token is learned.*user"):
        render.datum(TWO_TURNS[:1])


def test_a_conversation_over_the_limit_is_refused_and_never_cut(render):
    length = len(render.datum(TWO_TURNS).tokens)
    assert len(render.datum(TWO_TURNS, limit=length).tokens) == length
    with pytest.raises(DataError, match=f"{length} tokens, and the limit is {length - 1}"):
        render.datum(TWO_TURNS, limit=length - 1)


def test_an_unknown_train_on_is_answered_with_the_nearest(render):
    with pytest.raises(ConfigError, match="did you mean last_assistant_message"):
        render.datum(TWO_TURNS, train_on="last_asistant_message")


def test_auto_takes_the_template_where_there_is_one(tokenizers):
    assert renderer("auto", tokenizers["chatml"]).name == "chat_template"
    assert renderer("auto", tokenizers["no_template"]).name == "role_colon"


def test_an_unknown_renderer_is_answered_with_the_nearest(tokenizers):
    with pytest.raises(ConfigError, match="did you mean role_colon"):
        renderer("role-colon", tokenizers["chatml"])


def test_a_chat_template_that_is_not_there_is_refused(tokenizers):
    with pytest.raises(ModelError, match="no chat template; use the role_colon renderer"):
        renderer("chat_template", tokenizers["no_template"])
