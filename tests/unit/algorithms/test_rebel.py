"""The loop around the regression; that it finds its optimum is in `test_direct.py`."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tercet.algorithms.pairs import Pair, pairs_batch, with_reference
from tercet.algorithms.rebel import RebelConfig, gap_metrics, rebel
from tercet.engine.fake import FakeEngine
from tercet.errors import ConfigError
from tercet.recipes.rebel_iteration import charged
from tercet.types import Batch, Datum

START = 4
REWARDS = (0.0, 0.5, 1.0, 0.2)


def engine_of_answers():
    logits = torch.full((5, 5), -30.0)
    logits[START, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    return FakeEngine(vocabulary=5, logits=logits)


def answer(arm):
    return Datum([START, arm], [0.0, 1.0])


def pairs_of(trainer, temperature):
    pairs = [Pair(answer(i), answer(j), REWARDS[i] - REWARDS[j]) for i, j in ((1, 0), (2, 1), (2, 3), (3, 0))]
    flat = Batch([datum for pair in pairs for datum in pair.data])
    return with_reference(pairs, trainer.forward(flat, temperature=temperature).result().logprobs)


def learn(config, open_run, directory, steps, dies_at=None):
    trainer = engine_of_answers().trainer()
    pairs = pairs_of(trainer, config.temperature)
    with open_run(directory, steps=steps, dies_at=dies_at) as run:
        rebel(config, pairs, pairs, trainer=trainer, run=run, seed=0)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return trainer, rows


def test_at_its_temperature_the_policy_is_the_old_one_times_exp_eta_reward(open_run, tmp_path):
    config = RebelConfig(eta=2.0, temperature=0.5, pairs_per_step=4, epochs=150, learning_rate=0.1, warmup_steps=0)
    trainer, rows = learn(config, open_run, tmp_path, 150)
    found = trainer.sampler().logprobs([[START, arm] for arm in range(4)], temperature=0.5).result()
    wanted = torch.softmax(torch.tensor([0.4, 0.3, 0.2, 0.1]).log() / 0.5 + 2.0 * torch.tensor(REWARDS), -1)
    assert [math.exp(row[0]) for row in found] == pytest.approx(wanted.tolist(), abs=2e-3)
    assert rows[0]["loss"] == pytest.approx((0.25 + 0.25 + 0.64 + 0.04) / 4, abs=1e-6)  # mean squared gap
    assert rows[0]["scaled_loss"] == pytest.approx(2 * rows[0]["loss"], abs=1e-6)
    assert rows[-1]["test/loss"] < 1e-4 and rows[-1]["test/rewards/accuracies"] == 1.0
    assert rows[-1]["test/rewards/margins"] == pytest.approx((0.5 + 0.5 + 0.8 + 0.2) / 4, abs=1e-2)


def test_a_stopped_run_ends_where_an_undisturbed_one_ends(open_run, died, tmp_path):
    config = RebelConfig(pairs_per_step=3, epochs=9, max_steps=6, learning_rate=0.1, eval_every_steps=2)
    wanted = learn(config, open_run, tmp_path / "undisturbed", 6)[0].fingerprint()
    for step in (1, 4):
        with pytest.raises(died):
            learn(config, open_run, tmp_path / str(step), 6, dies_at=step)
        assert learn(config, open_run, tmp_path / str(step), 6)[0].fingerprint() == wanted


def test_answers_pay_for_being_likelier_than_under_the_first_policy():
    pair = Pair(answer(0), answer(1), 1.0)
    ours, first = [[0.0, -1.0], [0.0, -3.0]], [[0.0, -1.5], [0.0, -2.0]]
    [found] = charged([pair], ours, first, kl_coef=0.1)
    assert found.reward_gap == pytest.approx(1.0 - 0.1 * (0.5 - -1.0))


def test_gaps_are_told_in_units_of_the_reward():
    datum = answer(0)
    batch = pairs_batch(with_reference([Pair(datum, datum, 0.5)], [[0.0, -1.0], [0.0, -1.0]]))
    found = gap_metrics(batch, [[0.0, -0.5], [0.0, -1.5]], eta=4.0, loss=True)
    assert found["rewards/margins"] == pytest.approx(0.25)
    assert found["loss"] == pytest.approx((0.25 - 0.5) ** 2)


@pytest.mark.parametrize("wrong", [{"eta": 0.0}, {"temperature": 0.0}, {"kl_coef": -1.0}, {"pairs_per_step": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        RebelConfig(**wrong)
