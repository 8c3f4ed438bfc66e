from __future__ import annotations

import itertools
from typing import Any

import pytest

from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import renderer
from tercet.errors import DataError, ModelError
from tercet.types import Comparison, Message

LONG = 10_000


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


COMPARISON = Comparison(
    prompt=(user("Hi"), assistant("Hello."), user("Joke?")),
    a=(assistant("Knock."),),
    b=(assistant("No."),),
    label="B",
)
KINDS = [
    ("chat_template", name)
    for name in ("chatml", "llama3", "generation", "strict", "deaf", "words", "metaspace", "thoughtless")
]
KINDS += [("role_colon", name) for name in ("chatml", "metaspace", "no_bos")]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def chat(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    name, tokenizer = request.param
    return renderer(name, tokenizers[tokenizer])


def test_role_colon_writes_the_published_format(tokenizers):
    tokenizer = tokenizers["no_bos"]
    prompt = ComparisonRenderer(renderer("role_colon", tokenizer), LONG).prompt(COMPARISON)
    assert tokenizer.decode(prompt) == (
        "User: Hi\n\nAssistant: Hello.\n\nUser: Joke?\n\nSystem: ==== Completion A ====\n\nAssistant: Knock.\n\n"
        "System: ==== Completion B ====\n\nAssistant: No.\n\nSystem: ==== Preference ====\n\nAssistant:"
    )


def test_chatml_writes_headings_as_system_messages(tokenizers):
    tokenizer = tokenizers["chatml"]
    prompt = ComparisonRenderer(renderer("chat_template", tokenizer), LONG).prompt(COMPARISON)
    assert tokenizer.decode(prompt).endswith(
        "<|im_start|>user\nJoke?<|im_end|>\n"
        "<|im_start|>system\n==== Completion A ====<|im_end|>\n<|im_start|>assistant\nKnock.<|im_end|>\n"
        "<|im_start|>system\n==== Completion B ====<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>system\n==== Preference ====<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_system_messages_gets_headings_from_the_user(tokenizers):
    tokenizer = tokenizers["strict"]
    prompt = ComparisonRenderer(renderer("chat_template", tokenizer), LONG).prompt(COMPARISON)
    assert tokenizer.decode(prompt).endswith(
        "<start_of_turn>user\nJoke?\n\n==== Completion A ====<end_of_turn>\n<start_of_turn>model\nKnock.<end_of_turn>\n"
        "<start_of_turn>user\n==== Completion B ====<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n"
        "<start_of_turn>user\n==== Preference ====<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_that_drops_headings_silently_gets_them_from_the_user(tokenizers):
    tokenizer = tokenizers["deaf"]
    text = tokenizer.decode(ComparisonRenderer(renderer("chat_template", tokenizer), LONG).prompt(COMPARISON))
    for heading in ("Completion A", "Completion B", "Preference"):
        assert f"==== {heading} ====" in text


def test_only_the_first_label_token_is_learned(chat):
    render = ComparisonRenderer(chat, LONG)
    datum = render.datum(COMPARISON)
    prompt = render.prompt(COMPARISON)
    assert list(datum.tokens) == [*prompt, render.labels["B"]]
    assert list(datum.weights) == [0.0] * len(prompt) + [1.0]
    assert chat.tokenizer.decode([render.labels["B"]]).strip() == "B"


def test_the_label_token_is_the_one_a_full_rendering_would_have(chat):
    render = ComparisonRenderer(chat, LONG)
    question = (user("Hi"), assistant("Hello."), user("A or B?"))
    for label, token in render.labels.items():
        full = chat.datum((*question, assistant(label))).tokens
        assert full[len(chat.generation_prompt(question)) + len(chat.opening)] == token


def test_an_empty_block_of_thought_is_part_of_the_question_and_the_label_comes_right_after(tokenizers):
    tokenizer = tokenizers["thoughtless"]
    render = ComparisonRenderer(renderer("chat_template", tokenizer), LONG)
    assert tokenizer.decode(render.prompt(COMPARISON)).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert {label: tokenizer.decode([token]) for label, token in render.labels.items()}["A"] == "A"


def test_labels_that_begin_alike_are_refused(tokenizers):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # One token per byte: every label of role_colon begins with the same space.
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    with pytest.raises(ModelError, match="do not tell them apart"):
        ComparisonRenderer(renderer("role_colon", PreTrainedTokenizerFast(tokenizer_object=core)), LONG)


def test_a_missing_label_is_refused_when_learning(chat):
    with pytest.raises(DataError, match="without a label"):
        ComparisonRenderer(chat, LONG).datum(Comparison(COMPARISON.prompt, COMPARISON.a, COMPARISON.b))


def test_an_over_long_comparison_loses_the_left_of_its_conversation_and_keeps_bos(chat):
    whole = ComparisonRenderer(chat, LONG).datum(COMPARISON)
    bos = chat.tokenizer.bos_token_id
    first = int(whole.tokens[0] == bos)
    for dropped in range(1, 6):
        datum = ComparisonRenderer(chat, len(whole.tokens) - dropped).datum(COMPARISON)
        assert list(datum.tokens) == [*whole.tokens[:first], *whole.tokens[first + dropped :]]
        assert datum.weights[-1] == 1.0 and datum.weight == 1.0


def test_answers_and_headings_are_never_cut(chat):
    whole = ComparisonRenderer(chat, LONG).prompt(COMPARISON)
    shortest = None
    for limit in range(len(whole) + 1, 0, -1):
        try:
            shortest = ComparisonRenderer(chat, limit).prompt(COMPARISON)
        except DataError as error:
            assert f"the limit is {limit}" in str(error)
            break
        assert len(shortest) == limit - 1
    else:
        pytest.fail("no limit was too short")
    assert shortest is not None
    text = chat.tokenizer.decode(shortest, skip_special_tokens=False)
    for kept in ("==== Completion A ====", "Knock.", "==== Completion B ====", "No.", "==== Preference ===="):
        assert kept in text
    assert "Hello." not in text and "Joke" not in text


def test_the_message_says_how_many_tokens_the_answers_need(tokenizers):
    chat = renderer("role_colon", tokenizers["no_bos"])
    with pytest.raises(DataError) as caught:
        ComparisonRenderer(chat, 10).prompt(COMPARISON)
    needed = int(str(caught.value).split(" take ")[1].split()[0])
    assert len(ComparisonRenderer(chat, needed).prompt(COMPARISON)) == needed - 1
    with pytest.raises(DataError):
        ComparisonRenderer(chat, needed - 1).prompt(COMPARISON)


@pytest.mark.parametrize("missing", ["A", "B"])
def test_an_answer_left_out_takes_its_heading_with_it(chat, missing):
    one_sided = Comparison(
        COMPARISON.prompt,
        () if missing == "A" else COMPARISON.a,
        () if missing == "B" else COMPARISON.b,
        "A",
    )
    render = ComparisonRenderer(chat, LONG)
    text = chat.tokenizer.decode(render.prompt(one_sided), skip_special_tokens=False)
    assert f"Completion {missing}" not in text
    assert f"Completion {'B' if missing == 'A' else 'A'}" in text and "==== Preference ====" in text
    assert render.datum(one_sided).tokens[-1] == render.labels["A"]


def test_a_comparison_of_nothing_is_refused(chat):
    with pytest.raises(DataError, match="neither answer"):
        ComparisonRenderer(chat, LONG).prompt(Comparison(COMPARISON.prompt, (), ()))


def test_comparisons_of_one_prompt_share_it_and_their_first_answer(chat):
    render = ComparisonRenderer(chat, LONG)
    first, second, third = ((assistant(text),) for text in ("Knock knock.", "\nA door.", "So.\n\n"))

    def shared(one: list[int], two: list[int]) -> str:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
        return str(chat.tokenizer.decode([pair[0] for pair in same], skip_special_tokens=False))

    by_answers = {
        (i, j): render.prompt(Comparison(COMPARISON.prompt, a, b))
        for (i, a), (j, b) in itertools.permutations(enumerate((first, second, third)), 2)
    }
    assert "==== Completion B ====" in shared(by_answers[0, 1], by_answers[0, 2])
    to_a = shared(by_answers[0, 1], by_answers[1, 0])
    assert "==== Completion A ====" in to_a and "Completion B" not in to_a


def test_a_tournament_tokenises_each_answer_once_in_each_place(tokenizers):
    chat = renderer("chat_template", tokenizers["chatml"])
    render = ComparisonRenderer(chat, LONG)
    answers = [(assistant(f"Answer number {i}."),) for i in range(6)]
    misses = []
    for a, b in itertools.permutations(answers, 2):
        render.prompt(Comparison(COMPARISON.prompt, a, b))
        misses.append(chat._encode._cached.cache_info().misses)
    # 30 comparisons of 6 answers: the second pass over them all tokenises nothing.
    for a, b in itertools.permutations(answers, 2):
        render.prompt(Comparison(COMPARISON.prompt, a, b))
    assert chat._encode._cached.cache_info().misses == misses[-1]
    assert misses[-1] - misses[0] == 4  # the answers that the first comparison did not hold


def test_swapping_moves_the_answers_and_nothing_else(chat):
    render = ComparisonRenderer(chat, LONG)
    one, two = (chat.tokenizer.decode(render.prompt(c)) for c in (COMPARISON, COMPARISON.swapped()))
    assert one != two
    assert one.replace("Knock.", "@").replace("No.", "Knock.").replace("@", "No.") == two
