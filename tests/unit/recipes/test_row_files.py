from __future__ import annotations

import json

import pytest

from tercet.algorithms.prepare import SelectionConfig, prepare
from tercet.data import load_conversations
from tercet.data.files import read_file
from tercet.data.groups import Group, RankedPair, Sampled, load_groups, load_ranked_pairs
from tercet.errors import ConfigError, DataError, UsageError
from tercet.recipes.preparing import PrepareConfig, prepare_file, write_prepared
from tercet.recipes.row_files import check_new, write_rows, write_whole
from tercet.types import Message


class Stopped(Exception):
    pass


def rows_until(dies_at=None, asked=None):
    """Rows 0, 1, 2 …; the process dies when it should make the row `dies_at`."""

    def make(at, end):
        for i in range(at, end):
            if i == dies_at:
                raise Stopped
            if asked is not None:
                asked.append(i)
            yield {"i": i, "text": "é\u2028" * i}

    return make


def write(out, make, total=7, settings=None):
    return write_rows(out, settings or {"seed": 0}, total, make, verb="test", at_once=3)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("dies_at", [0, 2, 3, 5, 6])
def test_a_stopped_file_goes_on_after_its_last_whole_part(tmp_path, suffix, dies_at):
    wanted = write(tmp_path / f"wanted.{suffix}", rows_until())
    out, asked = tmp_path / f"rows.{suffix}", []
    with pytest.raises(Stopped):
        write(out, rows_until(dies_at))
    assert not out.exists()
    write(out, rows_until(asked=asked))
    assert asked == list(range(dies_at // 3 * 3, 7))
    assert [row for _, row in read_file(out)] == [row for _, row in read_file(wanted)]
    assert {path.name for path in tmp_path.iterdir()} == {out.name, wanted.name}


def test_a_torn_line_and_half_a_part_are_made_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Stopped):
        write(out, rows_until(3))
    part = tmp_path / "rows.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"i": 3, "text": "half"}\n{"i": 4, "te')
    write(out, rows_until())
    assert [row["i"] for _, row in read_file(out)] == list(range(7))
    assert json.loads(out.read_text().split("\n")[3]) == {"i": 3, "text": "é\u2028" * 3}


def test_a_file_begun_with_other_settings_is_not_gone_on_with(tmp_path):
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Stopped):
        write(out, rows_until(3))
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        write(out, rows_until(), settings={"seed": 1})


def test_a_file_that_is_there_and_one_of_another_kind_are_refused(tmp_path):
    write_whole(tmp_path / "rows.jsonl", [{"i": 1}])
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
        check_new(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=r"ends in none of .jsonl, .parquet"):
        check_new(tmp_path / "rows.csv")


ASKED = (Message("user", "Well?"),)
DIALOGUE = (*ASKED, Message("assistant", "Yes."), Message("user", "Why?"))


def group(prompt, *rewards, **more):
    """Answers of one token each, of which the last says more."""
    answers = [Sampled(f"answer {i}", (i + 5,), (-1.0,), "stop", reward) for i, reward in enumerate(rewards)]
    answers[-1] = Sampled(answers[-1].text, answers[-1].tokens, None, "stop", rewards[-1], **more)
    return Group(prompt, tuple(answers), (1, 2, 3))


@pytest.mark.parametrize("columns", ["tercet", "published"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_groups_that_differ_in_all_they_say_come_back_as_they_were(tmp_path, columns, suffix):
    gone_on = (Message("user", "And?"), Message("assistant", ""))
    groups = [
        group(ASKED, 0.5),
        group(DIALOGUE, 0.5, 1.0, -1.0, after=gone_on, columns={"judge": "a"}),
        group(ASKED, 1.0, 0.0),
    ]
    out = tmp_path / f"groups.{suffix}"
    write_rows(
        out, {"seed": 0}, 3, lambda at, end: (each.row(columns) for each in groups[at:end]), verb="test", at_once=2
    )
    assert load_groups(str(out)) == groups


def test_single_prompts_stay_text_in_a_table_without_a_dialogue(tmp_path):
    for name, prompts in (("alike", [ASKED, ASKED]), ("mixed", [ASKED, DIALOGUE])):
        write_whole(tmp_path / f"{name}.parquet", [group(each, 1.0).row("published") for each in prompts])
    write_whole(tmp_path / "mixed.jsonl", [group(each, 1.0).row("published") for each in (ASKED, DIALOGUE)])
    read = {path.name: [row["prompt"] for _, row in read_file(path)] for path in tmp_path.iterdir()}
    turns = [{"role": "user", "content": "Well?"}]
    assert read["alike.parquet"] == ["Well?", "Well?"]
    assert read["mixed.jsonl"][0] == "Well?" and len(read["mixed.jsonl"][1]) == 3
    assert read["mixed.parquet"] == [turns, read["mixed.jsonl"][1]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs_of_single_prompts_and_dialogues_come_back_as_they_were(tmp_path, kind):
    made = prepare(SelectionConfig(), [group(ASKED, 0.5, 1.0), group(DIALOGUE, 0.5, 1.0)], never, seed=0)
    write_prepared(made, tmp_path / "pairs", select="best_worst", kind=kind, made_of={})
    best, worst = Sampled("answer 1", (6,), reward=1.0), Sampled("answer 0", (5,), reward=0.5)
    assert load_ranked_pairs(str(tmp_path / "pairs")) == [
        RankedPair(prompt, best, worst, (1, 2, 3)) for prompt in (ASKED, DIALOGUE)
    ]


def never(prompt, words):
    raise AssertionError("answers that bring tokens are not tokenised again")


def test_a_column_of_several_kinds_is_named_and_its_rows_are_not_lost(tmp_path):
    with pytest.raises(DataError, match=r"column 'id' cannot be written as parquet.*rows.parquet.part, which is jsonl"):
        write_whole(tmp_path / "rows.parquet", [{"id": 1}, {"id": "b"}])
    assert (tmp_path / "rows.parquet.part").read_text() == '{"id": 1}\n{"id": "b"}\n'


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_answers_whose_reward_is_no_number_are_left_out_and_counted(tmp_path, kind):
    rows = [group(ASKED, 0.5, float("nan"), 1.0).row(), group(DIALOGUE, float("-inf"), 0.0).row()]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    config = PrepareConfig(data=str(tmp_path / "scored.jsonl"), out=tmp_path / "pairs", kind=kind)
    [pair] = load_ranked_pairs(str(prepare_file(config, say=said.append)))
    assert (pair.chosen.text, pair.rejected.text) == ("answer 2", "answer 0")
    assert "left out: 2 answers whose reward is no number" in said


@pytest.mark.parametrize("select", ["best_worst", "best"])
def test_an_answer_without_words_goes_all_the_way_through_prepare(tmp_path, select):
    silent = Group(
        DIALOGUE, (Sampled("", (2,), (-1.0,), "eos", 1.0), Sampled("No.", (7, 2), None, "stop", 0.0)), (1, 2)
    )
    write_whole(tmp_path / "scored.jsonl", [silent.row()])
    config = PrepareConfig(data=str(tmp_path / "scored.jsonl"), out=tmp_path / "pairs", select=select)
    out = str(prepare_file(config, say=print))
    if select == "best":
        assert load_conversations(out).rows == [(*DIALOGUE, Message("assistant", ""))]
    else:
        assert load_ranked_pairs(out)[0].chosen == Sampled("", (2,), reward=1.0)
