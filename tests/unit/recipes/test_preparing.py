"""Answers that come as text alone, what is drawn at which temperature, and dialogues that end early; on `tiny`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.algorithms.dialogues import branches
from tercet.algorithms.prepare import Prepared
from tercet.chat.renderers import renderer
from tercet.data.files import read_file
from tercet.data.groups import RankedPair, Sampled
from tercet.errors import ConfigError
from tercet.models.load import load_tokenizer
from tercet.recipes.generating import AnswersConfig, write_answers
from tercet.recipes.preparing import drawn_at, tokens_of, write_prepared
from tercet.recipes.rebel_iteration import RebelRunConfig, ranked_data, train_rebel
from tercet.types import Message

PROMPT = (Message("user", "Well?"),)


@pytest.mark.parametrize("name", ["chat_template", "role_colon"])
def test_an_answer_that_comes_as_text_ends_with_its_stop_as_a_sampled_one_does(name):
    chat = renderer(name, load_tokenizer("tiny"))
    asked, answer = tokens_of(chat, PROMPT, "Yes.")
    assert list(asked) == chat.generation_prompt(PROMPT)
    assert chat.parse(answer) == (Message("assistant", "Yes."), "stop")
    if name == "chat_template":
        assert answer[-1] == chat.stop[0] and answer.count(answer[-1]) == 1


def test_only_what_comes_without_tokens_gets_those_of_the_renderer(session):
    asked, words = tokens_of(session.renderer, PROMPT, "No.")
    row = RankedPair(PROMPT, Sampled("Yes.", (5, 6, 7), reward=1.0), Sampled("No.", reward=0.5))
    [pair] = ranked_data(session, [row], "to learn")
    sampled, rendered = pair.data
    assert tuple(sampled.tokens) == (*asked, 5, 6, 7) and sum(sampled.weights) == 3
    assert tuple(rendered.tokens) == (*asked, *words) and sum(rendered.weights) == len(words)


def prepared(out: Path, *temperatures: float) -> Path:
    pair = RankedPair(PROMPT, Sampled("Yes.", (5,), reward=1.0), Sampled("No.", (6,), reward=0.0), (1, 2))
    write_prepared(Prepared([pair], [], {}, temperatures), out, select="best_worst", made_of={})
    return out


def test_the_folder_and_its_files_say_at_which_temperatures_answers_were_drawn(tmp_path):
    folder = prepared(tmp_path / "pairs", 0.5, 1.0)
    assert drawn_at(str(folder)) == drawn_at(str(folder / "train.jsonl")) == [0.5, 1.0]
    assert drawn_at(str(prepared(tmp_path / "foreign"))) == drawn_at(str(tmp_path)) == drawn_at("owner/name") == []


def test_pairs_of_two_temperatures_are_learned_at_neither(tmp_path):
    config = RebelRunConfig(model="tiny", prepared=str(prepared(tmp_path / "pairs", 0.8, 1.0)))
    with pytest.raises(ConfigError, match=r"drawn at temperature 0\.8 and 1\.0, .*prepare answers of one temperature"):
        train_rebel(config)


def test_dialogues_that_end_for_lack_of_room_are_counted_aloud(session, heard, tmp_path):
    (tmp_path / "talker.py").write_text("def talks(dialogues):\n    return ['tea ' * 2000 for _ in dialogues]\n")
    config = AnswersConfig(n=2, max_tokens=3, turns=3, user=f"{tmp_path / 'talker.py'}:talks")
    prompts = [(Message("user", f"{i}?"),) for i in range(6)]
    out = tmp_path / "answers.jsonl"
    write_answers(session, session.engine.sampler(), prompts, config, out, temperature=0.7, seed=1)
    early = 2 * sum(each.end > 0 for each in branches(6, 3, seed=1))
    assert 0 < early < 12
    assert heard[-1].startswith(f"{early} of 12 dialogues left no room")
    assert [row["sampling_temperature"] for _, row in read_file(out)] == [0.7] * 6
