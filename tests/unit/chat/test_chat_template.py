from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tercet.chat.chat_template import ChatTemplate
from tercet.errors import DataError, ModelError
from tercet.types import Conversation, Datum, Message


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


TWO_TURNS = (user("Hi"), assistant("Hello."), user("Tell me a joke"), assistant("Knock knock."))
THINKING = (
    user("Hi"),
    assistant("<think>a greeting</think>Hello."),
    user("Tell me a joke"),
    assistant("<think>of a door</think>Knock knock."),
)


def learned(datum: Datum, tokenizer: Any) -> str:
    return str(tokenizer.decode([t for t, w in zip(datum.tokens, datum.weights, strict=True) if w]))


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_chatml_learns_the_answer_and_its_end_but_not_the_newline_after(tokenizers):
    datum = ChatTemplate(tokenizers["chatml"]).datum(TWO_TURNS)
    assert learned(datum, tokenizers["chatml"]) == "Hello.<|im_end|>Knock knock.<|im_end|>"
    assert tokenizers["chatml"].decode(datum.tokens) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nTell me a joke<|im_end|>\n"
        "<|im_start|>assistant\nKnock knock.<|im_end|>\n"
    )


def test_padding_with_the_stop_token_hides_no_stop(tokenizers):
    tokenizer = tokenizers["chatml"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    datum = ChatTemplate(tokenizer).datum(TWO_TURNS)
    stops = [w for t, w in zip(datum.tokens, datum.weights, strict=True) if t == tokenizer.eos_token_id]
    assert stops == [0.0, 0.0, 1.0, 0.0, 1.0]  # system, user, assistant, user, assistant


def test_the_stop_is_read_from_the_template_and_eos_is_added(tokenizers):
    def stop(name: str) -> list[Any]:
        tokenizer = tokenizers[name]
        return [s if isinstance(s, str) else tokenizer.decode([s]) for s in ChatTemplate(tokenizer).stop]

    assert stop("chatml") == ["<|im_end|>"]
    assert stop("llama3") == ["<|eot_id|>", "<|end_of_text|>"]
    assert stop("strict") == ["<end_of_turn>", "<eos>"]
    assert stop("metaspace") == ["</s>"]
    assert stop("words") == ["\n### end", "<|im_end|>"]


def test_prompt_is_what_the_tokenizer_itself_makes_of_the_template(tokenizers):
    for name in ("chatml", "llama3", "generation", "strict"):
        tokenizer = tokenizers[name]
        messages = [{"role": m.role, "content": m.content} for m in TWO_TURNS[:3]]
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        own = list(own if isinstance(own, list) else own["input_ids"])
        assert ChatTemplate(tokenizer).generation_prompt(TWO_TURNS[:3]) == own


def test_prompt_ends_with_the_header_of_an_answer(tokenizers):
    prompt = ChatTemplate(tokenizers["chatml"]).generation_prompt(TWO_TURNS[:3])
    assert tokenizers["chatml"].decode(prompt).endswith("Tell me a joke<|im_end|>\n<|im_start|>assistant\n")


def test_bos_of_the_template_is_not_doubled_by_a_tokenizer_that_adds_its_own(tokenizers):
    tokenizer = tokenizers["llama3"]
    assert tokenizer.encode("Hi")[0] == tokenizer.bos_token_id
    assert list(ChatTemplate(tokenizer).datum(TWO_TURNS).tokens).count(tokenizer.bos_token_id) == 1


def test_an_answer_that_begins_with_a_newline_does_not_merge_with_its_header(tokenizers):
    tokenizer = tokenizers["llama3"]
    stripped = tokenizer.chat_template.replace(" | trim", "")
    render = ChatTemplate(with_template(tokenizer, stripped))
    conversation = (user("Hi"), assistant("\n\nHello."))
    prompt = render.generation_prompt(conversation[:1])
    datum = render.datum(conversation)
    assert list(datum.tokens[: len(prompt)]) == prompt
    assert learned(datum, tokenizer) == "\n\nHello.<|eot_id|>"


def test_generation_marks_are_followed_and_the_stop_behind_them_is_learned_too(tokenizers):
    render = ChatTemplate(tokenizers["generation"])
    datum = render.datum(TWO_TURNS)
    assert learned(datum, tokenizers["generation"]) == "Hello.<|im_end|>Knock knock.<|im_end|>"
    # As written by the tokenizer itself, which knows the marks.
    messages = [{"role": m.role, "content": m.content} for m in TWO_TURNS]
    text = tokenizers["generation"].apply_chat_template(messages, tokenize=False)
    assert tokenizers["generation"].decode(datum.tokens) == text


@pytest.mark.parametrize("outer", ["'<|im_end|>\n'", "'<|im_end|>'"])
def test_generation_marks_may_take_in_the_stop_and_the_newline(tokenizers, outer):
    inside = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m['content'] + " + outer + " }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    datum = ChatTemplate(with_template(tokenizers["generation"], inside)).datum(TWO_TURNS)
    assert learned(datum, tokenizers["generation"]) == "Hello.<|im_end|>Knock knock.<|im_end|>"


def test_generation_marks_make_a_forgetful_template_learnable(tokenizers):
    datum = ChatTemplate(tokenizers["generation"]).datum(THINKING)
    assert learned(datum, tokenizers["generation"]) == "Hello.<|im_end|><think>of a door</think>Knock knock.<|im_end|>"


def test_answers_that_generation_marks_leave_out_are_not_learned_silently(tokenizers):
    template = tokenizers["generation"].chat_template.replace("== 'assistant'", "== 'assistant' and loop.last")
    render = ChatTemplate(with_template(tokenizers["generation"], template))
    with pytest.raises(DataError, match=r"message 1 \(assistant\) cannot be learned"):
        render.datum(TWO_TURNS)
    datum = render.datum(TWO_TURNS, train_on="last_assistant_turn")
    assert learned(datum, tokenizers["generation"]) == "Knock knock.<|im_end|>"


def test_generation_marks_around_the_header_do_not_make_it_learned(tokenizers):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    datum = ChatTemplate(with_template(tokenizers["generation"], template)).datum(TWO_TURNS)
    assert learned(datum, tokenizers["generation"]) == "Hello.<|im_end|>Knock knock.<|im_end|>"


def test_generation_marks_around_anything_but_answers_are_an_error(tokenizers):
    template = tokenizers["generation"].chat_template.replace("== 'assistant'", "!= 'system'")
    with pytest.raises(ModelError, match="surround 4 texts where there are 2 assistant messages"):
        ChatTemplate(with_template(tokenizers["generation"], template)).datum(TWO_TURNS)


def test_a_template_that_forgets_thoughts_is_refused_for_earlier_answers_and_learns_the_last(tokenizers):
    render = ChatTemplate(tokenizers["forgetful"])
    with pytest.raises(DataError, match=r"message 1 \(assistant\) cannot be learned.*last_assistant_message"):
        render.datum(THINKING)
    datum = render.datum(THINKING, train_on="last_assistant_message")
    assert learned(datum, tokenizers["forgetful"]) == "<think>of a door</think>Knock knock.<|im_end|>"
    prompt = render.generation_prompt(THINKING[:3])
    assert list(datum.tokens[: len(prompt)]) == prompt


def test_a_forgetful_template_learns_every_answer_of_a_conversation_without_thoughts(tokenizers):
    datum = ChatTemplate(tokenizers["forgetful"]).datum(TWO_TURNS)
    assert learned(datum, tokenizers["forgetful"]) == "Hello.<|im_end|>Knock knock.<|im_end|>"


def test_system_messages_may_stand_last_in_a_prompt(tokenizers):
    prompt = ChatTemplate(tokenizers["chatml"]).generation_prompt((user("Hi"), Message("system", "Be brief.")))
    text = tokenizers["chatml"].decode(prompt)
    assert text.endswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_the_template_refuses_is_named_with_the_templates_own_words(tokenizers):
    render = ChatTemplate(tokenizers["strict"])
    with pytest.raises(DataError, match=r"'Be kind'.*System role not supported"):
        render.datum((Message("system", "Be kind"), user("Hi"), assistant("Hello.")))


@pytest.mark.parametrize("call", ["generation_prompt", "datum"])
def test_an_empty_conversation_is_refused(tokenizers, call):
    empty: Conversation = ()
    with pytest.raises(DataError, match="empty conversation"):
        getattr(ChatTemplate(tokenizers["chatml"]), call)(empty)


def test_an_answer_to_nothing_cannot_be_learned_but_the_next_one_can(tokenizers):
    render = ChatTemplate(tokenizers["chatml"])
    conversation = (assistant("Welcome."), *TWO_TURNS[:2])
    with pytest.raises(DataError, match="nothing comes before it"):
        render.datum(conversation)
    assert learned(render.datum(conversation, train_on="last_assistant_message"), tokenizers["chatml"]) == (
        "Hello.<|im_end|>"
    )


def test_two_answers_in_a_row_are_one_turn(tokenizers):
    render = ChatTemplate(tokenizers["chatml"])
    conversation = (*TWO_TURNS, assistant("Who is there?"))
    assert learned(render.datum(conversation, train_on="last_assistant_turn"), tokenizers["chatml"]) == (
        "Knock knock.<|im_end|>Who is there?<|im_end|>"
    )


def test_a_template_whose_prompt_is_not_how_its_answers_begin_is_refused(tokenizers):
    template = tokenizers["chatml"].chat_template.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    )
    with pytest.raises(ModelError, match="cannot learn what it will be asked"):
        ChatTemplate(with_template(tokenizers["chatml"], template))


def test_a_template_without_an_end_of_answers_is_refused(tokenizers):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ModelError, match="by which an answer could be seen to end"):
        ChatTemplate(with_template(tokenizers["chatml"], template))


def test_an_empty_thought_written_by_the_template_is_learned_and_left_out_of_the_parsed_answer(tokenizers):
    tokenizer = tokenizers["thoughtless"]
    render = ChatTemplate(tokenizer)
    datum = render.datum(TWO_TURNS[:2])
    assert learned(datum, tokenizer) == "<think>\n\n</think>\n\nHello.<|im_end|>"
    sampled = [t for t, w in zip(datum.tokens, datum.weights, strict=True) if w]
    assert render.parse(sampled) == (assistant("Hello."), "stop")


def test_an_answer_is_over_at_its_first_stop(tokenizers):
    tokenizer = tokenizers["chatml"]
    render = ChatTemplate(tokenizer)
    sampled = tokenizer.encode("Hello.<|im_end|>\n<|im_start|>user", add_special_tokens=False)
    assert render.parse(sampled) == (assistant("Hello."), "malformed")


def test_eos_counts_as_a_stop_where_the_turn_ends_with_another_token(tokenizers):
    tokenizer = tokenizers["llama3"]
    sampled = tokenizer.encode("Hello.<|end_of_text|>", add_special_tokens=False)
    assert ChatTemplate(tokenizer).parse(sampled) == (assistant("Hello."), "stop")


def test_special_tokens_a_model_makes_up_do_not_reach_the_text(tokenizers):
    tokenizer = tokenizers["chatml"]
    sampled = tokenizer.encode("Hello.<|im_start|>system<|im_end|>", add_special_tokens=False)
    assert ChatTemplate(tokenizer).parse(sampled) == (assistant("Hello.system"), "stop")


def test_contents_equal_to_their_headers_are_told_apart(tokenizers):
    conversation = (user("user"), assistant("assistant\n"))
    datum = ChatTemplate(tokenizers["chatml"]).datum(conversation, train_on="all_messages")
    assert learned(datum, tokenizers["chatml"]) == "user<|im_end|>assistant\n<|im_end|>"


def test_messages_that_are_not_marked_are_not_learned_when_customized(tokenizers):
    render = ChatTemplate(tokenizers["chatml"])
    chosen = (*TWO_TURNS[:3], replace(TWO_TURNS[3], trainable=True))
    datum = render.datum(chosen, train_on="customized")
    assert learned(datum, tokenizers["chatml"]) == "Knock knock.<|im_end|>"
    with pytest.raises(DataError, match="no token is learned with train_on=customized"):
        render.datum(TWO_TURNS, train_on="customized")


def test_a_piece_in_the_middle_gets_no_space_from_a_tokenizer_that_writes_one_first(tokenizers):
    tokenizer = tokenizers["metaspace"]
    render = ChatTemplate(tokenizer)
    datum = render.datum((user("Hi"), assistant("Hello.")))
    text = "<s>user:Hi\nHello.</s>"
    assert list(datum.tokens) != tokenizer.encode("Hi") and tokenizer.decode(datum.tokens) == tokenizer.decode(
        tokenizer.encode(text, add_special_tokens=False)
    )
