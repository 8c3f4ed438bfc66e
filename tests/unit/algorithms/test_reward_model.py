from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from tercet.algorithms.reward_model import RewardModelConfig, grouped, pair_batch, reward_model
from tercet.chat.answers import AnswerRenderer
from tercet.chat.renderers import renderer
from tercet.engine.fake import FakeEngine
from tercet.engine.local import LocalEngine
from tercet.errors import ConfigError
from tercet.models.load import load_model, load_tokenizer
from tercet.rewards.scalar import ScalarJudge
from tercet.types import Head


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def separable(compare, n, seed):
    """Comparisons in which the better answer says yes and the worse one no, in random places."""
    chance = random.Random(seed)
    rows = []
    for _ in range(n):
        good, bad = (f"{word} {chance.choice('abcdefg')}" for word in ("yes", "no"))
        rows.append(compare(good, bad, "A") if chance.random() < 0.5 else compare(bad, good, "B"))
    return rows


@pytest.fixture(scope="module")
def shown():
    return AnswerRenderer(renderer("role_colon", load_tokenizer("tiny")), limit=128)


def test_a_model_learns_comparisons_that_one_word_decides(shown, compare, open_run, tmp_path):
    trainer = LocalEngine(load_model("tiny")).trainer(head=Head())
    config = RewardModelConfig(pairs_per_step=8, learning_rate=3e-3, eval_every_steps=0)
    data, held_out = separable(compare, 160, seed=0), separable(compare, 20, seed=1)
    with open_run(tmp_path, steps=config.steps(len(data)), save_every_steps=0) as run:
        reward_model(config, grouped(data, k_wise=False), held_out, shown, trainer=trainer, run=run, seed=0)
    first, *_, last = rows_of(tmp_path / "metrics.jsonl")
    assert last["test/accuracy"] == last["test/accuracy_both"] == 1
    assert last["test/flip_rate"] == 0 and last["test/nll"] < 0.2 < first["loss"]
    good, bad = ScalarJudge(trainer.scorer(), shown).scores([(held_out[0].prompt, held_out[0].chosen),
                                                             (held_out[0].prompt, held_out[0].rejected)])  # fmt: skip
    assert good > bad


CONFIG = RewardModelConfig(pairs_per_step=2, learning_rate=0.1, eval_every_steps=2, epochs=2)


def train(shown, compare, open_run, directory, dies_at=None):
    trainer = FakeEngine(vocabulary=len(shown.renderer.tokenizer), context_tokens=128).trainer(head=Head(), seed=1)
    data, held_out = separable(compare, 6, seed=0), separable(compare, 3, seed=1)
    with open_run(directory, steps=CONFIG.steps(6), dies_at=dies_at) as run:
        reward_model(CONFIG, grouped(data, k_wise=False), held_out, shown, trainer=trainer, run=run, seed=3)
    return trainer.fingerprint()


@pytest.mark.parametrize("dies_at", [0, 1, 3, 6])
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    shown, compare, open_run, died, tmp_path, dies_at
):
    expected = train(shown, compare, open_run, tmp_path / "straight")
    with pytest.raises(died):
        train(shown, compare, open_run, tmp_path / "killed", dies_at)
    assert train(shown, compare, open_run, tmp_path / "killed") == expected
    assert rows_of(tmp_path / "killed" / "metrics.jsonl") == rows_of(tmp_path / "straight" / "metrics.jsonl")


def test_both_answers_of_a_comparison_are_scored_whole(shown, compare):
    batch = pair_batch([(compare("yes", "no", "B"),)], shown)
    assert batch.pairs == [(0, 1)]
    texts = [shown.renderer.tokenizer.decode(list(datum.tokens)) for datum in batch.data]
    assert [text[text.index("Assistant:") :] for text in texts] == ["Assistant: no\n\nUser:", "Assistant: yes\n\nUser:"]


def test_comparisons_of_one_prompt_count_as_one_and_share_their_answers(shown, compare):
    ranked = [compare("a", "b", "A"), compare("a", "c", "A"), compare("c", "b", "B")]
    other = replace(compare("a", "b", "A", prompt="Who?"), margin=0.5)
    groups = grouped([ranked[0], other, *ranked[1:]], k_wise=True)
    assert groups == [tuple(ranked), (other,)]
    assert grouped(ranked, k_wise=False) == [(each,) for each in ranked]
    batch = pair_batch(groups, shown)
    assert len(batch.data) == 5  # a, b, c, and both of the other prompt
    assert batch.pairs == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert batch.pair_weights == [1 / 3, 1 / 3, 1 / 3, 1.0]
    assert batch.pair_streams == {"margins": [0.0, 0.0, 0.0, 0.5]}


@pytest.mark.parametrize(("settings", "message"), [
    ({"label_smoothing": 0.5}, "below 0.5"), ({"center": -1}, "center is -1"), ({"pairs_per_step": 0}, "at least 1"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardModelConfig(**settings)
