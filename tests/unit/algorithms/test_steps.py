from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from tercet.algorithms.policy_gradient import RLConfig
from tercet.algorithms.preference_model import PreferenceConfig
from tercet.algorithms.sft import SFTConfig, sft
from tercet.algorithms.steps import OptimConfig, learn, learn_and_step, rows_of_step, steps_of
from tercet.engine.fake import FakeEngine
from tercet.errors import ConfigError, TrainingError
from tercet.evaluation.nll import held_out
from tercet.types import AdamParams, Batch, Datum


def rates(config, steps):
    return [config.adam(step, steps).learning_rate for step in range(steps)]


def test_the_learning_rate_of_every_step_by_hand():
    assert rates(OptimConfig(learning_rate=1.0), 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(OptimConfig(learning_rate=1.0, schedule="constant"), 3) == [1.0] * 3
    assert rates(OptimConfig(learning_rate=1.0, schedule="cosine"), 4) == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    warm = OptimConfig(learning_rate=1.0, warmup_steps=2)
    assert rates(warm, 6) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_no_step_is_wasted_on_a_learning_rate_of_nought():
    for schedule in ("linear", "cosine", "constant"):
        for warmup in (0, 1, 3):
            assert min(rates(OptimConfig(learning_rate=1e-3, schedule=schedule, warmup_steps=warmup), 7)) > 0


def test_the_optimizer_gets_what_the_config_says():
    config = OptimConfig(learning_rate=0.5, weight_decay=0.1, max_grad_norm=None)
    assert config.adam(0, 1) == AdamParams(learning_rate=0.5, weight_decay=0.1, max_grad_norm=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(learning_rate=0), "learning_rate is 0"),
        (lambda: OptimConfig(learning_rate=1, warmup_steps=-1), "warmup_steps is -1"),
        (lambda: SFTConfig(batch_size=0), "batch_size is 0"),
        (lambda: PreferenceConfig(epochs=0), "epochs 0"),
        (lambda: RLConfig(group_size=1), "tournament of 1"),
        (lambda: RLConfig(group_size=5, chunk=4), "chunks of 4"),
        (lambda: RLConfig(substeps=9, prompts_per_step=8), "from 1 to prompts_per_step, which is 8"),
        (lambda: RLConfig(temperature=0), "temperature is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_steps_are_counted_up():
    assert steps_of(17, 16, 1, None) == 2
    assert steps_of(17, 16, 2, None) == 3
    assert steps_of(17, 16, 2, 1) == 1
    assert steps_of(16, 16, 1, None) == 1


@pytest.mark.parametrize(("rows", "per_step", "epochs"), [(17, 16, 1), (5, 2, 3), (3, 7, 2), (8, 4, 1)])
def test_every_row_comes_once_an_epoch_and_no_step_is_empty(rows, per_step, epochs):
    steps = [
        rows_of_step(range(rows), step, per_step, seed=1, epochs=epochs)
        for step in range(steps_of(rows, per_step, epochs, None))
    ]
    assert all(steps)
    shown = [row for step in steps for row in step]
    for epoch in range(epochs):
        assert sorted(shown[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert Counter(shown) == dict.fromkeys(range(rows), epochs)


def test_rows_without_a_last_epoch_always_fill_a_step():
    assert all(len(rows_of_step(range(3), step, 7, seed=0)) == 7 for step in range(5))
    assert rows_of_step(range(30), 2, 7, seed=0) != rows_of_step(range(30), 2, 7, seed=1)


def test_a_batch_whose_loss_is_not_finite_is_kept(tmp_path, open_run):
    trainer = FakeEngine(vocabulary=2).trainer()
    broken = Datum([0, 1], [0, 1], {"sampling_logprobs": [0.0, math.nan], "advantages": [0.0, 1.0]})
    run = open_run(tmp_path / "run", steps=1)
    with pytest.raises(TrainingError, match=r"the loss ppo is nan.*failed-batch\.json"):
        learn(trainer, Batch([broken]), "ppo", run, clip_low=0.1)
    kept = json.loads((tmp_path / "run" / "failed-batch.json").read_text())
    assert (kept["loss"], kept["settings"], kept["data"][0]["tokens"]) == ("ppo", {"clip_low": 0.1}, [0, 1])


def test_a_batch_whose_gradient_is_not_finite_is_kept(tmp_path, open_run):
    trainer = FakeEngine(vocabulary=2).trainer()
    before = trainer.fingerprint()
    # The loss is a number of float32; the sum of squares of its gradient is not.
    steep = Datum([0, 1], [0, 1], {"sampling_logprobs": [0.0, -0.7], "advantages": [0.0, 1e25]})
    run = open_run(tmp_path / "run", steps=1)
    with pytest.raises(TrainingError, match=r"the gradient's norm is inf.*failed-batch\.json"):
        learn_and_step(trainer, Batch([steep]), "importance_sampling", AdamParams(learning_rate=0.1), run)
    assert json.loads((tmp_path / "run" / "failed-batch.json").read_text())["data"][0]["tokens"] == [0, 1]
    assert trainer.fingerprint() == before


DATA = [Datum([i % 3, (i * i) % 3, (i + 1) % 3], [0, 1, 1 + i % 2]) for i in range(11)]
CONFIG = SFTConfig(batch_size=4, epochs=2, learning_rate=0.1, eval_every_steps=2)
STEPS = CONFIG.steps(len(DATA))


def train(directory, open_run, dies_at=None):
    engine = FakeEngine(vocabulary=3)
    trainer = engine.trainer()
    with open_run(directory, steps=STEPS, dies_at=dies_at) as run:
        sft(CONFIG, DATA, held_out(DATA[:3], engine.language.decode), trainer=trainer, run=run, seed=5)
    return trainer.fingerprint()


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.parametrize("dies_at", range(STEPS + 1))
def test_a_run_killed_at_any_step_and_resumed_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    tmp_path, open_run, died, dies_at
):
    expected = train(tmp_path / "straight", open_run)
    with pytest.raises(died):
        train(tmp_path / "killed", open_run, dies_at)
    assert train(tmp_path / "killed", open_run) == expected
    assert logged(tmp_path / "killed") == logged(tmp_path / "straight")


def test_a_finished_run_is_not_done_again(tmp_path, open_run):
    train(tmp_path, open_run)
    start = FakeEngine(vocabulary=3).trainer().fingerprint()
    assert train(tmp_path, open_run) == start  # the new trainer was not touched


def test_supervised_learning_makes_the_data_likely(tmp_path, open_run):
    train(tmp_path, open_run)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[0]["test/nll"] == pytest.approx(math.log(3))
    assert rows[-1]["test/nll"] < rows[0]["test/nll"] - 0.05
    assert rows[0]["num_sequences"] == 4 and rows[0]["num_loss_tokens"] == 8
