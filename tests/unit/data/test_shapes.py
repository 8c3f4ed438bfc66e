"""Rows of every shape become the conversations and comparisons they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tercet.data import SHAPES, load_comparisons, load_conversations, load_labelled, load_prompts
from tercet.errors import DataError
from tercet.types import Comparison, Conversation, Message


def user(words: str) -> Message:
    return Message("user", words)


def assistant(words: str) -> Message:
    return Message("assistant", words)


ASK, GOOD, BAD = user("Name a fruit."), assistant("An apple."), assistant("No.")
TURNS = [{"role": "user", "content": "Name a fruit."}]
FIRST, SECOND = {"role": "assistant", "content": "An apple."}, {"role": "assistant", "content": "No."}
HH_GOOD, HH_BAD = "\n\nHuman: Name a fruit.\n\nAssistant: An apple.", "\n\nHuman: Name a fruit.\n\nAssistant: No."


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


COMPARED: list[tuple[str, dict[str, Any]]] = [
    ("prompt/chosen/rejected", {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}),
    ("prompt/chosen/rejected", {"prompt": TURNS, "chosen": [FIRST], "rejected": [SECOND]}),
    ("prompt/chosen/rejected", {"prompt": TURNS, "chosen": [*TURNS, FIRST], "rejected": [*TURNS, SECOND]}),
    ("prompt/chosen/rejected", {"prompt": HH_GOOD[:-9], "chosen": "An apple.", "rejected": "No."}),
    (
        "UltraFeedback binarised",
        {
            "prompt": "Name a fruit.",
            "prompt_id": "1",
            "chosen": [*TURNS, FIRST],
            "rejected": [*TURNS, SECOND],
            "messages": [*TURNS, FIRST],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
    ),
    ("chosen/rejected", {"chosen": [*TURNS, FIRST], "rejected": [*TURNS, SECOND]}),
    ("chosen/rejected", {"chosen": "Name a fruit.\nAn apple.", "rejected": "Name a fruit.\nNo."}),
    ("raw HH", {"chosen": HH_GOOD, "rejected": HH_BAD}),
    ("HelpSteer3", {"context": TURNS, "response1": "An apple.", "response2": "No.", "overall_preference": -2}),
    ("HelpSteer3", {"context": TURNS, "response1": "No.", "response2": "An apple.", "overall_preference": 3}),
    (
        "sharegpt ranking",
        {
            "conversations": [{"from": "human", "value": "Name a fruit."}],
            "chosen": {"from": "gpt", "value": "An apple."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ),
    (
        "instruction preferences",
        {"instruction": "Name a fruit.", "input": "", "output": "Apple", "chosen": "An apple.", "rejected": "No."},
    ),
    (
        "PandaLM",
        {
            "instruction": "Name a fruit.",
            "input": "",
            "response1": "No.",
            "response2": "An apple.",
            "annotator1": 2,
            "annotator2": 1,
            "annotator3": 2,
        },
    ),
    ("REBEL pairs", {"prompt": "Name a fruit.", "chosen": "An apple.", "reject": "No.", "chosen_reward": 1.0}),
    ("REBEL pairs", {"prompt": "Name a fruit.", "chosen": [*TURNS, FIRST], "reject": [*TURNS, SECOND]}),
]


@pytest.mark.parametrize(("shape", "row"), COMPARED)
def test_a_comparison_of_any_shape_has_the_same_prompt_and_the_better_answer_first(
    shape: str, row: dict[str, Any], file: Any
) -> None:
    loaded = load_comparisons(file(row))
    assert loaded.shape == shape
    assert loaded.rows == [Comparison((ASK,), (GOOD,), (BAD,), "A")]


@pytest.mark.parametrize(("shape", "row"), COMPARED)
def test_the_better_answer_of_a_comparison_is_a_conversation_and_its_prompt_a_prompt(
    shape: str, row: dict[str, Any], file: Any
) -> None:
    source = file(row)
    assert load_conversations(source).rows == [(ASK, GOOD)]
    assert load_prompts(source).rows == [(ASK,)]


KIND, KINDLY = Message("system", "Be kind."), {"role": "system", "content": "Be kind."}
SUM = (user("Add.\n1 and 2"), assistant("3"))
BLOCKS = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit."}]
SPOKEN: list[tuple[str, dict[str, Any], Conversation]] = [
    ("messages", {"messages": [*TURNS, FIRST]}, (ASK, GOOD)),
    ("messages", {"messages": [KINDLY, *TURNS, FIRST]}, (KIND, ASK, GOOD)),
    ("messages", {"messages": [{"role": "user", "content": BLOCKS}, FIRST]}, (ASK, GOOD)),
    (
        "No Robots",
        {"prompt": "Name a fruit.", "prompt_id": "7", "messages": [*TURNS, FIRST], "category": "QA"},
        (ASK, GOOD),
    ),
    ("prompt/completion", {"prompt": "Name a fruit.", "completion": "An apple."}, (ASK, GOOD)),
    ("prompt/completion", {"prompt": TURNS, "completion": [FIRST]}, (ASK, GOOD)),
    ("alpaca", {"instruction": "Name a fruit.", "input": "", "output": "An apple."}, (ASK, GOOD)),
    ("alpaca", {"instruction": "Add.", "input": "1 and 2", "output": "3"}, SUM),
    (
        "alpaca",
        {"instruction": "Name a fruit.", "output": "An apple.", "system": "Be kind.", "history": [["Hi", "Hello"]]},
        (KIND, user("Hi"), assistant("Hello"), ASK, GOOD),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "An apple."}]},
        (ASK, GOOD),
    ),
    ("self-instruct", {"instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}]}, SUM),
]


@pytest.mark.parametrize(("shape", "row", "conversation"), SPOKEN)
def test_a_conversation_of_any_shape_has_the_turns_it_means(
    shape: str, row: dict[str, Any], conversation: Conversation, file: Any
) -> None:
    loaded = load_conversations(file(row))
    assert loaded.shape == shape
    assert loaded.rows == [conversation]
    assert load_prompts(file(row)).rows == [conversation[:-1]]


def test_every_shape_of_the_table_is_tried_here_or_with_trees_and_prompts() -> None:
    tried = {shape for shape, *_ in [*COMPARED, *SPOKEN]} | {"oasst trees", "prompt"}
    assert {shape.name for shape in SHAPES} == tried


def test_a_prompt_alone_can_be_answered_but_not_learned(file: Any) -> None:
    source = file({"prompt": "Name a fruit."}, {"prompt": [*TURNS, FIRST, *TURNS]})
    assert load_prompts(source).rows == [(ASK,), (ASK, GOOD, ASK)]
    with pytest.raises(DataError, match="shape prompt, which gives no conversations"):
        load_conversations(source)


def test_a_prompt_is_given_once_and_its_repetitions_are_counted(file: Any) -> None:
    loaded = load_prompts(file(*[row for _, row in COMPARED[:1] * 3]))
    assert loaded.rows == [(ASK,)]
    assert loaded.dropped == {"a prompt seen before": 2}


def test_a_tie_is_a_comparison_labelled_so_and_no_conversation(file: Any) -> None:
    row = {"context": TURNS, "response1": "An apple.", "response2": "A pear.", "overall_preference": 0}
    better = {**row, "overall_preference": 1}
    assert [pair.label for pair in load_comparisons(file(row, better)).rows] == ["Tie", "A"]
    loaded = load_conversations(file(row, better))
    assert loaded.rows == [(ASK, assistant("A pear."))]
    assert loaded.dropped == {"a tie: neither answer is better": 1}


def test_annotators_without_a_majority_give_no_comparison_and_are_counted(file: Any) -> None:
    row = {"instruction": "Name a fruit.", "response1": "No.", "response2": "Ok", "annotator1": 2, "annotator2": 1}
    loaded = load_comparisons(file(row, {**row, "annotator2": 2}, {**row, "annotator1": 0, "annotator2": 0}))
    assert [pair.label for pair in loaded.rows] == ["A", "Tie"]
    assert loaded.dropped == {"the annotators disagree": 1}


def test_shared_words_are_cut_back_so_that_answers_which_begin_alike_stay_whole(file: Any) -> None:
    rows = load_comparisons(
        file(
            {"chosen": "What is up?\nThe sky is.", "rejected": "What is up?\nThe floor is."},
            {"chosen": "Colour of snow: white", "rejected": "Colour of snow: wheat"},
        )
    ).rows
    assert rows[0] == Comparison(
        (user("What is up?"),), (assistant("The sky is."),), (assistant("The floor is."),), "A"
    )
    assert rows[1] == Comparison((user("Colour of snow:"),), (assistant("white"),), (assistant("wheat"),), "A")


def test_raw_hh_rows_that_break_its_rules_are_counted_by_reason_without_a_flag(file: Any) -> None:
    def row(chosen: str, rejected: str) -> dict[str, str]:
        return {"chosen": chosen, "rejected": rejected}

    loaded = load_comparisons(
        file(
            row(HH_GOOD, HH_BAD),
            row(HH_GOOD + "\n\nHuman: Thanks.\n\nAssistant: Sure.", HH_BAD),
            row(HH_GOOD, HH_BAD.replace("fruit", "berry")),
            row(HH_GOOD, HH_GOOD + " "),
            row(HH_GOOD + "\n\nHuman: Thanks", HH_GOOD + "\n\nHuman: Bye"),
            row(HH_GOOD, "\n\nHuman: Name a fruit.\n\nAssistant:"),
            row("\n\nHuman: Hi" + HH_GOOD, "\n\nHuman: Hi" + HH_BAD),
            row("Apple.", "No."),
        )
    )
    assert loaded.shape == "raw HH"
    assert loaded.rows == [Comparison((ASK,), (GOOD,), (BAD,), "A")]
    assert loaded.dropped == {
        "different numbers of turns": 1,
        "a difference before the last turn": 1,
        "both answers are the same": 1,
        "the last turn is not the assistant's": 1,
        "an empty turn": 1,
        "turns do not alternate": 1,
        "not a dialogue of 'Human:' and 'Assistant:'": 1,
    }
    assert "left out 7" in loaded.describe() and "raw HH, 1 rows" in loaded.describe()


def test_equal_answers_are_left_out_and_counted_in_every_shape(file: Any) -> None:
    same = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Hello."}
    loaded = load_comparisons(file(same, COMPARED[0][1]))
    assert len(loaded.rows) == 1
    assert loaded.dropped == {"both answers are the same": 1}


def test_an_answer_labelled_bad_is_not_learned(file: Any) -> None:
    loaded = load_conversations(
        file({"messages": [*TURNS, FIRST], "label": True}, {"messages": [*TURNS, SECOND], "label": False})
    )
    assert loaded.rows == [(ASK, GOOD)]
    assert loaded.dropped == {"labelled as a bad answer": 1}


def node(role: str, words: str, *replies: object, rank: int | None = None, **more: object) -> dict[str, object]:
    return {"role": role, "text": words, "rank": rank, "replies": list(replies), **more}


TREE = {
    "message_tree_id": "1",
    "prompt": node(
        "prompter",
        "Name a fruit.",
        node("assistant", "No.", rank=2),
        node(
            "assistant",
            "An apple.",
            node("prompter", "Another?", node("assistant", "A pear.")),
            node("prompter", "Thanks!"),
            node("prompter", "A red one?", node("assistant", "Cherry.", rank=0), node("assistant", "Sky.", rank=1)),
            rank=0,
        ),
        node("assistant", "Figs", node("prompter", "Why?", node("assistant", "Because.")), rank=1),
        node("assistant", "Spam", rank=3, deleted=True),
    ),
}


def test_a_tree_gives_every_path_of_best_answers(file: Any) -> None:
    loaded = load_conversations(file(TREE))
    assert loaded.rows == [
        (ASK, GOOD, user("Another?"), assistant("A pear.")),
        (ASK, GOOD, user("A red one?"), assistant("Cherry.")),
    ]
    assert loaded.dropped == {"a deleted turn": 1}


def test_a_tree_gives_a_comparison_for_every_two_answers_of_different_rank(file: Any) -> None:
    loaded = load_comparisons(file(TREE))
    said = [(pair.prompt[-1].content, pair.a[0].content, pair.b[0].content) for pair in loaded.rows]
    assert said == [
        ("Name a fruit.", "An apple.", "Figs"),
        ("Name a fruit.", "An apple.", "No."),
        ("Name a fruit.", "Figs", "No."),
        ("A red one?", "Cherry.", "Sky."),
    ]
    assert loaded.rows[-1].prompt == (ASK, GOOD, user("A red one?"))


def test_a_tree_without_an_answer_is_counted(file: Any) -> None:
    loaded = load_conversations(file({"prompt": node("prompter", "Anybody?")}, TREE))
    assert loaded.dropped == {"a tree without an answer": 1, "a deleted turn": 1}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "Hi", "chosen": "", "rejected": "No."}, "'chosen' is empty"),
        ({"prompt": "Hi", "chosen": None, "rejected": "No."}, "'chosen' is empty"),
        ({"prompt": "Hi", "rejected": "No."}, "'chosen' is missing"),
        ({"prompt": 3, "chosen": "Yes.", "rejected": "No."}, "'prompt' is a number; it must be a list of turns"),
        (
            {"prompt": [*TURNS, FIRST], "chosen": "Yes.", "rejected": "No."},
            "'prompt' does not end with a turn of the user",
        ),
        ({"prompt": "Hi", "chosen": [{"role": "tool", "content": "x"}], "rejected": "No."}, "the role 'tool'"),
        ({"prompt": "Hi", "chosen": [*TURNS, FIRST], "rejected": [*TURNS, SECOND]}, "'prompt' is not among the turns"),
    ],
)
def test_a_bad_row_is_an_error_with_file_and_row_and_can_be_counted_instead(
    row: dict[str, Any], complaint: str, file: Any
) -> None:
    source = file(COMPARED[0][1], row, COMPARED[1][1])
    with pytest.raises(DataError) as caught:
        load_comparisons(source)
    for part in (f"{source}:2: ", complaint, f"columns: {', '.join(row)}", "prompt/chosen/rejected", "--skip-bad-rows"):
        assert part in str(caught.value)
    loaded = load_comparisons(source, skip_bad_rows=True)
    assert len(loaded.rows) == 2
    assert sum(loaded.dropped.values()) == 1 and complaint in next(iter(loaded.dropped))


def test_a_row_of_no_known_shape_is_told_its_columns_and_all_shapes(file: Any) -> None:
    source = file({"question": "Hi", "reply": "Hello"})
    with pytest.raises(DataError) as caught:
        load_conversations(source)
    assert f"{source}:1: no known shape" in str(caught.value)
    assert "columns: question, reply" in str(caught.value)
    assert all(shape.name in str(caught.value) for shape in SHAPES)
    with pytest.raises(DataError, match="gives no conversations: no known shape has these columns 1"):
        load_conversations(source, skip_bad_rows=True)


def test_a_bad_first_row_does_not_decide_the_shape_of_the_others(file: Any) -> None:
    loaded = load_comparisons(file({"chosen": None, "rejected": ""}, COMPARED[7][1]), skip_bad_rows=True)
    assert loaded.shape == "raw HH"
    assert loaded.dropped == {"'chosen' is empty": 1}


def test_a_conversation_in_which_the_assistant_says_nothing_cannot_be_learned(file: Any) -> None:
    with pytest.raises(DataError, match="without a turn of the assistant"):
        load_conversations(file({"messages": TURNS}))


def test_max_rows_bounds_what_is_read_and_given(file: Any) -> None:
    source = file(COMPARED[0][1], COMPARED[0][1], {"broken": True})
    assert len(load_comparisons(source, max_rows=1).rows) == 1
    assert len(load_comparisons(file(TREE), max_rows=2).rows) == 2


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), ("false", False)])
def test_a_labelled_answer_says_whether_it_is_good(label: object, good: bool, file: Any) -> None:
    [row] = load_labelled(file({"prompt": "Name a fruit.", "completion": "An apple.", "label": label})).rows
    assert (row.prompt, row.answer, row.good) == ((ASK,), (GOOD,), good)


@pytest.mark.parametrize("label", ["maybe", 2, None])
def test_a_label_that_is_neither_is_refused(label: object, file: Any) -> None:
    with pytest.raises(DataError, match="'label'"):
        load_labelled(file({"prompt": "Name a fruit.", "completion": "An apple.", "label": label}))


def test_rows_that_cannot_be_labelled_name_the_shapes_that_can(file: Any) -> None:
    with pytest.raises(DataError, match="gives no labelled answers; shapes that do: prompt/completion"):
        load_labelled(file({"messages": [*TURNS, FIRST]}))


def test_a_margin_says_by_how_much_the_better_answer_is_better(file: Any) -> None:
    row = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}
    rows = load_comparisons(file({**row, "margin": 1.5}, {**row, "margin": "2"}, {**row, "margin": None}, row)).rows
    assert [each.margin for each in rows] == [1.5, 2.0, 0.0, 0.0]
    with pytest.raises(DataError, match="'margin' is 'much'; it must be a number"):
        load_comparisons(file({**row, "margin": "much"}))


def test_prompts_keep_what_else_their_rows_say(file: Any) -> None:
    loaded = load_prompts(file({"prompt": "Name a fruit.", "target": "apple"}, {"prompt": "And?", "target": "pear"}))
    assert [row["target"] for row in loaded.columns] == ["apple", "pear"]
