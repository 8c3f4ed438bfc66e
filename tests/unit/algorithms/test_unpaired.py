from __future__ import annotations

import math

import pytest
import torch

from tercet.algorithms.pairs import with_stream
from tercet.algorithms.unpaired import (
    KTOConfig,
    Labelled,
    divergence,
    kto,
    labelled_metrics,
    mismatch,
    sequences,
    with_references,
)
from tercet.engine.fake import FakeEngine
from tercet.errors import ConfigError, DataError
from tercet.types import Batch, Datum

PROMPTS, ARMS = (4, 5), range(4)


def engine_of_answers():
    """Two prompts, tokens 4 and 5; an answer is one of four tokens behind it."""
    logits = torch.full((6, 6), -30.0)
    logits[4:, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    return FakeEngine(vocabulary=6, logits=logits)


def answer(prompt, arm):
    return Datum([prompt, arm], [0.0, 1.0])


def labelled(trainer, good=(2,)):
    """Every answer to every prompt, some of them good."""
    rows = [(answer(prompt, arm), arm in good) for arm in ARMS for prompt in PROMPTS]
    others = mismatch([datum for datum, _ in rows], limit=2)
    found = [Labelled(datum, label, other) for (datum, label), other in zip(rows, others, strict=True)]
    return with_references(found, trainer.forward(Batch(sequences(found))).result().logprobs)


def test_every_prompt_meets_an_answer_to_another():
    data = [answer(4, 0), answer(4, 1), answer(5, 2)]
    assert [tuple(each.tokens) for each in mismatch(data, limit=2)] == [(4, 2), (4, 2), (5, 1)]


def test_of_three_different_prompts_none_meets_its_own_answer():
    data = [answer(prompt, prompt - 3) for prompt in (3, 4, 5)]
    assert [tuple(each.tokens) for each in mismatch(data, limit=2)] == [(3, 2), (4, 0), (5, 1)]


def test_a_mismatched_answer_keeps_its_tokens_and_weights_whole():
    long, short = Datum([1, 2, 3, 4], [0.0, 0.0, 1.0, 0.5]), Datum([5, 6], [0.0, 1.0])
    assert mismatch([long, short], limit=4) == [Datum((1, 2, 6), (0.0, 0.0, 1.0)), Datum((5, 3, 4), (0.0, 1.0, 0.5))]


def test_an_answer_that_does_not_fit_behind_the_prompt_makes_way_for_the_next_that_does():
    far, long, short = (Datum([4, 0, 1], [0.0, 1.0, 1.0]), Datum([5, 0, 1, 2], [0.0, 1.0, 1.0, 1.0]),
                        Datum([6, 7, 3], [0.0, 0.0, 1.0]))  # fmt: skip
    found = [tuple(each.tokens) for each in mismatch([far, long, short], limit=4)]
    # Behind 6 7 there is room for two tokens: of the rows before, the nearest has three, the next two.
    assert found == [(4, 3), (5, 0, 1), (6, 7, 0, 1)]
    assert [tuple(each.tokens) for each in mismatch([far, long, short], limit=5)][2] == (6, 7, 0, 1, 2)


def test_where_no_other_answer_fits_the_nearest_loses_its_end():
    long, full = Datum([4, 0, 1, 2], [0.0, 1.0, 0.5, 1.0]), Datum([5, 6, 7, 3], [0.0, 0.0, 0.0, 1.0])
    assert mismatch([long, full], limit=4)[1] == Datum((5, 6, 7, 0), (0.0, 0.0, 0.0, 1.0))
    twin = Datum([5, 6, 7, 2], [0.0, 0.0, 0.0, 1.0])  # its answer fits, but it is one to the same prompt
    assert [tuple(each.tokens) for each in mismatch([long, full, twin], limit=4)][1:] == [(5, 6, 7, 0)] * 2


def test_one_prompt_alone_is_refused():
    with pytest.raises(DataError, match="all 2 answers have the same prompt"):
        mismatch([answer(4, 0), answer(4, 1)], limit=2)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ConfigError, match="rows_per_step is 1"):
        KTOConfig(rows_per_step=1)


def test_the_divergence_is_the_mean_log_ratio_of_mismatched_answers_and_never_below_0():
    trainer = engine_of_answers().trainer()
    rows = labelled(trainer)
    assert divergence(trainer, rows) == pytest.approx(0, abs=1e-6)

    def known(gap):
        other = with_stream(answer(4, 0), "reference_logprobs", [0.0, math.log(0.4) - gap])
        return Labelled(answer(4, 0), True, other)

    assert divergence(trainer, [known(1.0), known(0.2)]) == pytest.approx(0.6, abs=1e-6)
    assert divergence(trainer, [known(-1.0), known(0.2)]) == 0.0


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_good_answers_become_likely_for_every_prompt(loss, open_run, tmp_path):
    config = KTOConfig(loss=loss, beta=1.0, rows_per_step=8, epochs=80, learning_rate=0.1, warmup_steps=0)
    trainer = engine_of_answers().trainer()
    rows = labelled(trainer)
    with open_run(tmp_path, steps=80, save_every_steps=0) as run:
        kto(config, rows, rows, trainer=trainer, run=run, seed=0)
    found = trainer.sampler().logprobs([[prompt, 2] for prompt in PROMPTS]).result()
    assert all(math.exp(row[0]) > 0.6 for row in found)


def test_a_stopped_run_ends_where_an_undisturbed_one_ends(open_run, died, tmp_path):
    config = KTOConfig(rows_per_step=3, max_steps=6, epochs=9, learning_rate=0.1, eval_every_steps=2)

    def learn(directory, dies_at=None):
        trainer = engine_of_answers().trainer()
        rows = labelled(trainer)
        with open_run(directory, steps=6, dies_at=dies_at) as run:
            kto(config, rows, rows[:3], trainer=trainer, run=run, seed=0)
        return trainer.fingerprint()

    wanted = learn(tmp_path / "undisturbed")
    for step in (1, 4):
        with pytest.raises(died):
            learn(tmp_path / str(step), dies_at=step)
        assert learn(tmp_path / str(step)) == wanted


def test_metrics_of_an_empty_kind_are_left_out():
    datum = with_stream(with_stream(answer(4, 0), "reference_logprobs", [0.0, -1.0]), "desirable", [0.0, 1.0])
    assert labelled_metrics(Batch([datum]), [[0.0, -0.5]], beta=0.1) == pytest.approx(
        {"count/chosen": 1, "rewards/chosen": 0.05, "logps/chosen": -0.5, "count/rejected": 0}
    )
