from __future__ import annotations

import json
import random

import pytest
import torch

from tercet.algorithms.preference_model import PreferenceConfig, both_orders, preference_model
from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import renderer
from tercet.engine.bodies import Budgets
from tercet.engine.fake import FakeEngine
from tercet.engine.local import LocalEngine
from tercet.models.load import load_model
from tercet.types import Batch


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


def test_a_model_learns_comparisons_that_one_word_decides(compare, open_run, tmp_path):
    loaded = load_model("tiny")
    short = ComparisonRenderer(renderer("role_colon", loaded.tokenizer), limit=128)
    config = PreferenceConfig(pairs_per_step=8, learning_rate=3e-3, eval_every_steps=0)
    data, held_out = separable(compare, 480, seed=0), separable(compare, 20, seed=1)
    with open_run(tmp_path, steps=config.steps(len(data)), save_every_steps=0) as run:
        preference_model(config, data, held_out, short, trainer=LocalEngine(loaded).trainer(), run=run, seed=0)
    last = rows_of(tmp_path / "metrics.jsonl")[-1]
    assert last["test/accuracy"] == last["test/accuracy_both"] == 1
    assert last["test/flip_rate"] == 0 and last["test/nll"] < 0.3


CONFIG = PreferenceConfig(pairs_per_step=2, learning_rate=0.1, eval_every_steps=2, epochs=2)


def train(shown, compare, open_run, directory, dies_at=None):
    vocabulary = len(shown.renderer.tokenizer)
    trainer = FakeEngine(vocabulary=vocabulary, context_tokens=512).trainer()
    data = [*separable(compare, 5, seed=0), compare("yes", "no", "Tie")]
    with open_run(directory, steps=CONFIG.steps(6), dies_at=dies_at) as run:
        preference_model(CONFIG, data, separable(compare, 3, seed=1), shown, trainer=trainer, run=run, seed=3)
    return trainer.fingerprint()


def test_both_orders_are_in_every_step(shown, compare, open_run, tmp_path):
    train(shown, compare, open_run, tmp_path)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row.get("num_sequences") for row in rows] == [4] * 6 + [None]
    assert all(row["num_loss_tokens"] == 4 for row in rows[:-1])
    # A table of the last token cannot tell answers apart: it ends with the shares of the labels, each place alike.
    assert rows[-1]["test/accuracy_both"] == 0 and rows[-1]["test/nll"] < rows[0]["test/nll"]


@pytest.mark.parametrize("dies_at", [0, 1, 3, 6])
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    shown, compare, open_run, died, tmp_path, dies_at
):
    expected = train(shown, compare, open_run, tmp_path / "straight")
    with pytest.raises(died):
        train(shown, compare, open_run, tmp_path / "killed", dies_at)
    assert train(shown, compare, open_run, tmp_path / "killed") == expected
    assert rows_of(tmp_path / "killed" / "metrics.jsonl") == rows_of(tmp_path / "straight" / "metrics.jsonl")


def test_no_held_out_comparisons_measure_nothing(shown, compare, open_run, tmp_path):
    config = PreferenceConfig(pairs_per_step=1, max_steps=1)
    trainer = FakeEngine(vocabulary=len(shown.renderer.tokenizer), context_tokens=512).trainer()
    with open_run(tmp_path, steps=1) as run:
        preference_model(config, [compare("yes", "no", "A")], [], shown, trainer=trainer, run=run, seed=0)
    assert not any(key.startswith("test/") for row in rows_of(tmp_path / "metrics.jsonl") for key in row)


def test_a_small_budget_tears_no_comparison(shown, compare):
    rows = [*separable(compare, 3, seed=0), compare("yes", "no", "Tie")]
    found = []
    for budget in (1, 4096):
        engine = FakeEngine(
            vocabulary=len(shown.renderer.tokenizer), context_tokens=512, budgets=Budgets(micro_batch_tokens=budget)
        )
        trainer = engine.trainer()
        loss = trainer.forward_backward(both_orders(rows, shown), "both_orders").result().loss
        found.append((loss, trainer.table.logits.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_label_weight_of_one_is_the_likelihood_of_the_labels_in_both_orders(shown, compare):
    rows = separable(compare, 3, seed=0)
    trainer = FakeEngine(vocabulary=len(shown.renderer.tokenizer), context_tokens=512).trainer()
    labels = Batch([shown.datum(each) for row in rows for each in (row, row.swapped())])
    expected = trainer.forward_backward(labels, "cross_entropy").result().loss
    ours = trainer.forward_backward(both_orders(rows, shown), "both_orders", label_weight=1.0).result()
    assert ours.loss == pytest.approx(expected, rel=1e-6)
    assert ours.metrics["label_nll"] == pytest.approx(expected, rel=1e-6)
