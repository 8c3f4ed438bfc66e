from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tercet.errors import DataError
from tercet.evaluation.exports import CATEGORY_TEMPERATURES, EXPORTS, Told, load_questions, markdown_counts

TURN = {"question_id": 81, "category": "math", "turns": ["2 + 2?", "And twice that?"]}


def written(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def only(export, source, **settings):
    [found] = load_questions(export, source, split="train", rows=None, **settings).rows
    return found


def test_an_alpaca_eval_row_repeats_the_instruction_letter_for_letter(tmp_path):
    asked = only("alpaca-eval", written(tmp_path / "q.jsonl", {
        "instruction": " Say\u2028hello. ", "output": "theirs", "generator": "davinci", "dataset": "koala",
    }))  # fmt: skip
    assert asked.turns == (" Say\u2028hello. ",)
    assert EXPORTS["alpaca-eval"].write(asked, [Told("Hello.", 2)], "mine") == {
        "instruction": " Say\u2028hello. ", "dataset": "koala", "output": "Hello.", "generator": "mine",
    }  # fmt: skip


def test_prompts_of_any_shape_are_instructions_where_they_are_single_turns(tmp_path):
    source = written(tmp_path / "q.jsonl", {"prompt": "Why?"}, {"prompt": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    ]})  # fmt: skip
    with pytest.raises(DataError, match="prompt 2: a prompt of several turns.*pass --skip-bad-rows"):
        load_questions("alpaca-eval", source, split="train", rows=None)
    found = load_questions("alpaca-eval", source, split="train", rows=None, skip_bad_rows=True)
    assert ([each.turns for each in found.rows], found.left_out) == ([("Why?",)], 1)


def test_an_instruction_with_an_input_is_refused(tmp_path):
    source = written(tmp_path / "q.jsonl", {"instruction": "Add", "input": "1 2"})
    with pytest.raises(DataError, match=r"q.jsonl:1: 'input' beside 'instruction'"):
        load_questions("alpaca-eval", source, split="train", rows=None)


def test_an_mt_bench_row_has_a_turn_for_every_turn_and_the_categorys_temperature(tmp_path):
    asked = only("mt-bench", written(tmp_path / "q.jsonl", TURN))
    assert (asked.turns, asked.temperature) == (("2 + 2?", "And twice that?"), 0.0)
    row = EXPORTS["mt-bench"].write(asked, [Told("4", 1), Told("8", 1)], "mine")
    assert len(row.pop("answer_id")) == 22
    assert row == {
        "question_id": 81, "model_id": "mine", "choices": [{"index": 0, "turns": ["4", "8"]}], "tstamp": 0.0,
    }  # fmt: skip
    assert only("mt-bench", written(tmp_path / "r.jsonl", {**TURN, "category": "gossip"})).temperature is None


def test_an_arena_hard_row_is_a_conversation_with_what_style_control_counts(tmp_path):
    asked = only("arena-hard", written(tmp_path / "q.jsonl", {"uid": "ab", "category": "c", "prompt": "Why?"}))
    row = EXPORTS["arena-hard"].write(asked, [Told("**So**", 3)], "mine")
    assert row["messages"] == [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": {"answer": "**So**"}},
    ]  # fmt: skip
    assert (row["uid"], row["model"], row["metadata"]["token_len"]) == ("ab", "mine", 3)
    assert row["metadata"]["bold_count"] == {"**": 1, "__": 0}


def test_markdown_is_counted_outside_of_code():
    counts = markdown_counts("# A\n### B\n1. x\n  2. y\n- z\n* q\n__b__\n```\n# no\n- no\n```\n")
    assert counts["header_count"] == {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 2, "unordered": 2}
    assert counts["bold_count"] == {"**": 0, "__": 1}


@pytest.mark.parametrize(("export", "row", "said"), [
    ("mt-bench", {"question_id": 1, "category": "math", "turns": []}, "'turns' must be a list of texts"),
    ("mt-bench", {"category": "math", "turns": ["a"]}, "'question_id' is missing"),
    ("arena-hard", {"prompt": "a"}, "'uid' is missing"),
])  # fmt: skip
def test_a_row_of_another_benchmark_is_refused_by_file_and_line(tmp_path, export, row, said):
    source = written(tmp_path / "q.jsonl", row)
    with pytest.raises(DataError, match=f"q.jsonl:1: {said}.*A question of {export} is"):
        load_questions(export, source, split="train", rows=None)
    with pytest.raises(DataError, match=f"has no question of {export}"):
        load_questions(export, source, split="train", rows=None, skip_bad_rows=True)


@pytest.mark.skipif("TERCET_DATA" not in os.environ, reason="wants real data: set TERCET_DATA")
def test_the_published_questions_are_read_whole():
    root = Path(os.environ["TERCET_DATA"])
    for export, count in (("mt-bench", 80), ("arena-hard", 500)):
        found = load_questions(export, str(root / export / "question.jsonl"), split="train", rows=None).rows
        assert len({str(each.about) for each in found}) == count
        if export == "mt-bench":
            assert all(len(each.turns) == 2 and each.temperature is not None for each in found)
    assert len(CATEGORY_TEMPERATURES) == 8
