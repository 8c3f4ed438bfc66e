"""Losses per row and per pair, and trainers with a head, tried on every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tercet.errors import CheckpointError, EngineError
from tercet.losses import LOSSES, Loss
from tercet.types import AdamParams, Batch, Datum, Head

ADAM = AdamParams(learning_rate=1e-2)


def gap(logprobs, lengths, *, bonus, chosen, rejected, margins):
    """Per pair: how much more the chosen row's mean log-prob and its bonus are, squared; with the margin taken off."""
    mean = logprobs / lengths + bonus
    distance = mean[chosen] - mean[rejected] - margins
    return distance**2, {"distance": distance.detach()}


def spread(logprobs, *, bonus):
    """Per row: its squared distance from the mean of all rows, which no row knows alone."""
    each = logprobs * bonus
    return (each - each.mean()) ** 2, {"each": each.detach()}


def scored(scores, *, chosen, rejected):
    return -torch.nn.functional.logsigmoid(scores[chosen] - scores[rejected]), {}


def valued(logprobs, entropies, values, *, advantages):
    return (values - advantages) ** 2 - logprobs * advantages - 0.1 * entropies, {}


@pytest.fixture(autouse=True)
def extra_losses(monkeypatch):
    for name, loss in {
        "gap": Loss(gap, "pair_mean", ("bonus",), "pair", ("logprobs", "lengths"), ("margins",)),
        "spread": Loss(spread, "row_mean", ("bonus",), "row", separable=False),
        "scored": Loss(scored, "pair_mean", (), "pair", ("scores",)),
        "valued": Loss(valued, "token_mean", ("advantages",), "token", ("logprobs", "entropies", "values")),
    }.items():
        monkeypatch.setitem(LOSSES, name, loss)


@pytest.fixture
def pairs(batch) -> Batch:
    data = [
        Datum(d.tokens, d.weights, {**d.streams, "bonus": [0.0] * (len(d.tokens) - 1) + [0.1 * i - 0.2]})
        for i, d in enumerate(batch.data)
    ]
    return Batch(
        data, [(0, 5), (1, 2), (4, 3), (4, 6)], pair_weights=[1.0, 2.0, 0.5, 1.0],
        pair_streams={"margins": [0.0, 0.3, -0.1, 1.0]},
    )  # fmt: skip


def weighted_sums(trainer, batch):
    rows = trainer.forward(batch).result().logprobs
    return np.array([np.dot(row, datum.weights) for row, datum in zip(rows, batch.data, strict=True)])


def test_a_loss_per_pair_is_the_weighted_mean_of_its_pairs(subject, pairs):
    trainer = subject.trainer(subject.engine())
    mean = weighted_sums(trainer, pairs) / np.array([d.weight for d in pairs.data])
    mean += np.array([d.streams["bonus"][-1] * d.weights[-1] for d in pairs.data])
    gaps = np.array([mean[c] - mean[r] for c, r in pairs.pairs]) - np.array(pairs.pair_streams["margins"])
    weights = np.array(pairs.pair_weights)
    result = trainer.forward_backward(pairs, "gap").result()
    assert result.loss == pytest.approx((gaps**2 * weights).sum() / weights.sum(), rel=1e-4)
    assert result.metrics["distance"] == pytest.approx((gaps * weights).sum() / weights.sum(), rel=1e-4)


def test_a_loss_per_row_that_looks_at_all_rows_is_their_mean(subject, pairs):
    trainer = subject.trainer(subject.engine())
    each = weighted_sums(trainer, pairs) * np.array([d.streams["bonus"][-1] * d.weights[-1] for d in pairs.data])
    result = trainer.forward_backward(pairs, "spread").result()
    assert result.loss == pytest.approx(((each - each.mean()) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize("loss", ["gap", "spread", "scored", "valued"])
def test_no_loss_depends_on_how_the_batch_is_split(subject, pairs, gradient, loss):
    found: list[tuple[Any, torch.Tensor]] = []
    for budget in (1, 9, 4096):
        trainer = subject.trainer(subject.engine(micro_batch_tokens=budget), seed=2, head=Head())
        if subject.name != "fake":
            # An adapter that changes nothing has half of its gradient at zero: take a step first.
            trainer.forward_backward(Batch(pairs.data), "cross_entropy").result()
            trainer.optim_step(ADAM).result()
        result = trainer.forward_backward(pairs, loss).result()
        found.append((result, gradient(trainer)))
    for result, flat in found[1:]:
        assert result.loss == pytest.approx(found[0][0].loss, rel=1e-4)
        torch.testing.assert_close(flat, found[0][1], rtol=1e-3, atol=1e-5)
    assert float(found[0][1].norm()) > 1e-3


def test_scores_are_learned_and_frozen_and_come_back_from_disk(subject, pairs, tmp_path):
    engine = subject.engine()
    trainer = subject.trainer(engine, seed=1, head=Head())
    rows = [datum.tokens for datum in pairs.data]
    before = trainer.scorer()
    first = before.scores(rows).result()
    for _ in range(15):
        trainer.forward_backward(pairs, "scored").result()
        trainer.optim_step(ADAM).result()
    after = trainer.scorer().scores(rows).result()
    assert before.scores(rows).result() == first
    gaps = [sum(scores[c] - scores[r] for c, r in pairs.pairs) for scores in (first, after)]
    assert gaps[1] > gaps[0] + 0.5
    weights = trainer.save(tmp_path / "saved").result()
    assert engine.scorer(weights).scores(rows).result() == after
    assert engine.scorer(weights).fingerprint() == trainer.fingerprint() == trainer.scorer().fingerprint()
    child = subject.trainer(engine, init=weights)
    assert child.scorer().scores(rows).result() == after
    child.load(weights).result()
    assert child.fingerprint() == trainer.fingerprint()


def test_going_on_with_a_head_equals_never_having_stopped(subject, pairs, tmp_path):
    def learn(trainer: Any) -> list[float]:
        losses = []
        for _ in range(3):
            losses.append(trainer.forward_backward(pairs, "valued").result().loss)
            trainer.optim_step(ADAM).result()
        return losses

    straight = subject.trainer(subject.engine(), seed=3, head=Head())
    learn(straight)
    weights = straight.save(tmp_path / "saved").result()
    expected = learn(straight), straight.fingerprint()
    resumed = subject.trainer(subject.engine(), seed=8, head=Head())
    resumed.load(weights).result()
    assert (learn(resumed), resumed.fingerprint()) == expected


def test_a_score_does_not_depend_on_its_neighbours(subject, pairs):
    scorer = subject.trainer(subject.engine(), seed=1, head=Head()).scorer()
    rows = [datum.tokens for datum in pairs.data]
    together = scorer.scores(rows).result()
    assert together == [pytest.approx(scorer.scores([row]).result()[0], abs=1e-5) for row in rows]


def test_the_last_value_asked_for_is_that_of_the_tokens_before(subject):
    trainer = subject.trainer(subject.engine(), seed=1, head=Head())
    datum = Datum([3, 4, 5, 6], [0.0, 0.0, 1.0, 1.0])
    values = trainer.forward(Batch([datum]), values_only=True).result()
    assert values.logprobs == [] and values.values[0][:2] == [0.0, 0.0]
    scores = trainer.scorer().scores([[3, 4], [3, 4, 5]]).result()
    assert values.values[0][2:] == pytest.approx(scores, abs=1e-5)


def test_what_needs_a_head_or_pairs_is_refused_without(subject, pairs, tmp_path):
    engine = subject.engine()
    plain = subject.trainer(engine)
    with pytest.raises(EngineError, match="valued needs a head"):
        plain.forward_backward(pairs, "valued").result()
    with pytest.raises(EngineError, match="no head"):
        plain.scorer()
    with pytest.raises(EngineError, match="no head"):
        plain.forward(pairs, values_only=True).result()
    with pytest.raises(EngineError, match="no head"):
        engine.scorer(plain.save(tmp_path / "plain").result())
    with pytest.raises(EngineError, match="gap compares pairs, and the batch has none"):
        plain.forward_backward(Batch(pairs.data), "gap").result()
    with pytest.raises(EngineError, match="gap needs the pair stream margins"):
        plain.forward_backward(Batch(pairs.data, pairs.pairs), "gap").result()
    with pytest.raises(CheckpointError, match="the trainer has a head, and the save has none"):
        subject.trainer(engine, head=Head()).load(plain.save(tmp_path / "again").result()).result()


def test_a_pair_outside_the_batch_and_a_stream_of_another_length_are_refused():
    datum = Datum([3, 4], [0.0, 1.0])
    with pytest.raises(EngineError, match=r"the pair \(0, 2\) points outside the batch of 2 sequences"):
        Batch([datum, datum], [(0, 2)])
    with pytest.raises(EngineError, match="margins has 2 entries for 1 pairs"):
        Batch([datum, datum], [(0, 1)], pair_streams={"margins": [0.0, 1.0]})
