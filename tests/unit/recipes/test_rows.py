from __future__ import annotations

import json
from pathlib import Path

import pytest

from tercet import data
from tercet.algorithms.policy_gradient import RLConfig
from tercet.errors import ConfigError, DataError
from tercet.recipes.rows import (
    Question,
    conversation_data,
    gives_comparisons,
    held_out_questions,
    prompts_to_learn,
    questions,
    rows_sha256,
    some,
    train_and_test,
    usable_comparisons,
)
from tercet.recipes.session import SetupConfig, open_session
from tercet.types import Comparison, Message


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(role: str, text: str) -> tuple[Message, ...]:
    return (Message(role, text),)


def pair(prompt: str, chosen: str = "Yes.", rejected: str = "No.", label: str = "A") -> Comparison:
    return Comparison(said("user", prompt), said("assistant", chosen), said("assistant", rejected), label)  # type: ignore[arg-type]


def test_a_source_without_a_test_split_has_a_tenth_held_out(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": f"Q{i}", "completion": "A"} for i in range(30)])
    heard: list[str] = []
    kept, held = train_and_test(data.load_conversations, SetupConfig(), source, None, 64, heard.append)
    assert (len(kept), len(held)) == (27, 3) and not set(kept) & set(held)
    assert heard[-1] == f"3 of 30 rows of {source} are held out for tests"


def test_a_source_of_one_row_has_nothing_to_hold_out(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    with pytest.raises(DataError, match="gives one row"):
        train_and_test(data.load_conversations, SetupConfig(), source, None, 64, print)


def test_of_a_test_split_so_many_rows_are_taken_by_the_seed():
    kept, held = train_and_test(data.load_comparisons, SetupConfig(), "builtin", None, 7, lambda line: None)
    again = train_and_test(data.load_comparisons, SetupConfig(), "builtin", None, 7, lambda line: None)[1]
    assert len(held) == 7 and held == again and not {c.prompt for c in held} & {c.prompt for c in kept}


def test_some_rows_keep_their_order():
    assert some(range(5), 9, seed=0) == [0, 1, 2, 3, 4]
    few = some(range(100), 10, seed=0)
    assert few == sorted(few) and len(set(few)) == 10 and few != some(range(100), 10, seed=1)


def test_what_a_source_gives_is_known_from_its_first_row(tmp_path):
    assert gives_comparisons("builtin")
    assert not gives_comparisons(jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}]))


def test_conversations_over_the_limit_are_left_out_and_counted(session, heard):
    rows = [(*said("user", "Hi"), *said("assistant", text)) for text in ("Ho.", "long words " * 200)]
    assert len(conversation_data(session, rows, train_on="all_assistant_messages", max_length=100)) == 1
    assert heard[-1] == "1 of 2 conversations have more than 100 tokens and are left out"
    with pytest.raises(DataError, match="raise max_length"):
        conversation_data(session, rows, train_on="all_assistant_messages", max_length=3)


def test_comparisons_whose_answers_do_not_fit_are_left_out_and_counted(session, heard):
    kept = usable_comparisons(session, [pair("Q"), pair("Q", chosen="long words " * 200)], 400, "to learn")
    assert kept == [pair("Q")]
    assert heard[-1] == "1 of 2 comparisons to learn have answers too long for 400 tokens and are left out"


def test_prompts_that_begin_like_held_out_ones_are_not_learned(session, heard, tmp_path):
    def asked(*texts: str) -> dict[str, object]:
        roles = ("user", "assistant", "user")
        return {"prompt": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    rows = [asked("Q0", "Yes.", "More?"), *(asked(f"Q{i}") for i in range(4))]
    config = RLConfig(data=jsonl(tmp_path / "p.jsonl", rows), max_tokens=8)
    left = prompts_to_learn(session, config, [Question(said("user", "Q0"))])
    assert [prompt[-1].content for prompt in left] == ["Q1", "Q2", "Q3"]
    assert heard[-1] == "2 of 5 prompts begin like held-out ones and are left out"
    with pytest.raises(DataError, match="leaves no prompt to learn"):
        prompts_to_learn(session, config, [Question(said("user", f"Q{i}")) for i in range(4)])


def test_questions_are_distinct_prompts_with_the_better_answer():
    found = questions([pair("Q"), pair("Q", chosen="Also."), pair("R", label="B"), pair("S", label="Tie")])
    assert [(q.prompt[0].content, q.chosen and q.chosen[0].content) for q in found] == [("Q", "Also."), ("R", "No.")]


def test_held_out_questions_come_with_answers_only_where_the_source_has_them(session, tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"prompt": f"Q{i}"} for i in range(20)])
    assert [q.chosen for q in held_out_questions(session, source, None, 9)] == [None, None]
    assert all(q.chosen for q in held_out_questions(session, "builtin", None, 5))
    assert not any(q.chosen for q in held_out_questions(session, source, "builtin", 5))


def test_the_hash_of_rows_tells_their_order_and_content():
    assert rows_sha256([pair("Q")]) == rows_sha256([pair("Q")])
    assert len({rows_sha256(rows) for rows in ([], [1, 2], [2, 1], [pair("Q")], [pair("R")])}) == 5


def test_a_judge_must_have_room_for_two_answers(session):
    session.check_room(limit=300, answer_tokens=50)
    with pytest.raises(ConfigError, match="two answers of 500 tokens .* and the judge reads 300; lower max_tokens"):
        session.check_room(limit=300, answer_tokens=500)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"max_rows": 0}, {"micro_batch_tokens": -1}])
def test_numbers_below_one_are_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be at least 1"):
        open_session(SetupConfig(model="tiny", **wrong), print)
