"""What every engine promises, tried on each of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tercet.errors import EngineError, TercetError, TrainingError
from tercet.types import AdamParams, Batch, Datum, SamplingParams

ADAM = AdamParams(learning_rate=1e-2)
PROMPTS = [[3, 4, 5], [6], [3, 4, 7, 7, 5], [5, 5]]


def learn(trainer, batch, steps):
    return [
        (
            trainer.forward_backward(batch, "cross_entropy").result().loss,
            trainer.optim_step(ADAM).result().grad_norm,
        )
        for _ in range(steps)
    ]


def test_requests_are_done_in_the_order_they_were_made(subject, batch):
    waiting, hasty = (subject.trainer(subject.engine()) for _ in range(2))
    waited = []
    for _ in range(2):
        waited.append(waiting.forward_backward(batch, "cross_entropy").result().logprobs)
        waiting.optim_step(ADAM).result()
    waited.append(waiting.forward(batch).result().logprobs)
    futures = [hasty.forward_backward(batch, "cross_entropy"), hasty.optim_step(ADAM)]
    futures += [hasty.forward_backward(batch, "cross_entropy"), hasty.optim_step(ADAM), hasty.forward(batch)]
    assert [futures[i].result().logprobs for i in (0, 2, 4)] == waited
    assert waited[0] != waited[1] != waited[2]


def test_learning_lowers_the_loss(subject, batch):
    losses = [loss for loss, _ in learn(subject.trainer(subject.engine()), batch, 10)]
    assert losses[-1] < losses[0] - 0.01


def test_a_trainer_begins_as_the_base(subject, batch):
    engine = subject.engine()
    trainer = subject.trainer(engine)
    base = engine.sampler().logprobs([datum.tokens for datum in batch.data]).result()
    ours = trainer.forward(batch).result().logprobs
    assert [row[1:] for row in ours] == [pytest.approx(row, abs=1e-6) for row in base]


def test_a_sampler_does_not_follow_later_steps(subject, batch):
    trainer = subject.trainer(subject.engine())
    sampler = trainer.sampler()
    rows = [datum.tokens for datum in batch.data]
    before, hash_before = sampler.logprobs(rows).result(), sampler.fingerprint()
    assert hash_before == trainer.fingerprint()
    learn(trainer, batch, 2)
    assert sampler.logprobs(rows).result() == before
    assert sampler.fingerprint() == hash_before != trainer.fingerprint()
    assert trainer.sampler().logprobs(rows).result() != before
    assert trainer.sampler().fingerprint() == trainer.fingerprint()


@pytest.mark.parametrize("new_trainer", [False, True], ids=["same trainer", "new trainer"])
def test_going_on_from_a_save_equals_never_having_stopped(subject, batch, tmp_path, new_trainer):
    engine = subject.engine()
    straight = subject.trainer(engine, seed=3)
    learn(straight, batch, 3)
    weights = straight.save(tmp_path / "saved").result()
    assert weights.path == tmp_path / "saved"
    expected = learn(straight, batch, 3), straight.fingerprint()
    if new_trainer:
        subject.trainer(engine, seed=8)
        resumed = subject.trainer(engine, seed=9)
    else:
        resumed = straight
    resumed.load(weights).result()
    assert (learn(resumed, batch, 3), resumed.fingerprint()) == expected


def test_going_on_in_a_new_engine_equals_never_having_stopped(subject, batch, tmp_path):
    straight = subject.trainer(subject.engine(), seed=3)
    learn(straight, batch, 3)
    weights = straight.save(tmp_path / "saved").result()
    expected = learn(straight, batch, 3), straight.fingerprint()
    resumed = subject.trainer(subject.engine(), init=weights)
    resumed.load(weights).result()
    assert (learn(resumed, batch, 3), resumed.fingerprint()) == expected


def test_a_save_before_any_step_can_be_gone_on_from(subject, batch, tmp_path):
    engine = subject.engine()
    trainer = subject.trainer(engine)
    weights = trainer.save(tmp_path / "start").result()
    expected = learn(trainer, batch, 2)
    trainer.load(weights).result()
    assert learn(trainer, batch, 2) == expected


def test_loading_drops_a_gradient_that_was_not_used(subject, batch, tmp_path):
    trainer = subject.trainer(subject.engine())
    weights = trainer.save(tmp_path / "start").result()
    trainer.forward_backward(batch, "cross_entropy").result()
    trainer.load(weights).result()
    assert trainer.optim_step(ADAM).result().grad_norm == 0


def test_init_takes_the_weights_and_a_new_optimizer(subject, batch, tmp_path):
    engine = subject.engine()
    trainer = subject.trainer(engine)
    learn(trainer, batch, 3)
    weights = trainer.save(tmp_path / "saved").result()
    child = subject.trainer(engine, init=weights)
    assert child.fingerprint() == trainer.fingerprint() == engine.sampler(weights).fingerprint()
    assert len(child.optimizer.state) == 0
    rows = [datum.tokens for datum in batch.data]
    assert engine.sampler(weights).logprobs(rows).result() == trainer.sampler().logprobs(rows).result()


def test_damaged_and_missing_saves_are_refused(subject, batch, tmp_path):
    trainer = subject.trainer(subject.engine())
    learn(trainer, batch, 1)
    weights = trainer.save(tmp_path / "saved").result()
    (weights.path / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(TercetError, match="optimizer"):
        trainer.load(weights).result()
    with pytest.raises(TercetError, match="empty"):
        trainer.engine.sampler(type(weights)(Path(tmp_path / "empty")))


def test_a_missing_stream_is_refused_by_name(subject):
    trainer = subject.trainer(subject.engine())
    datum = Datum([3, 4], [0.0, 1.0], {"advantages": [0.0, 1.0]})
    with pytest.raises(EngineError, match=r"ppo needs the stream sampling_logprobs, which datum 0 lacks"):
        trainer.forward_backward(Batch([datum]), "ppo").result()


def test_an_unknown_loss_and_an_unknown_setting_are_refused(subject, batch):
    trainer = subject.trainer(subject.engine())
    with pytest.raises(EngineError, match=r"no loss 'ppoo'; there are .*ppo"):
        trainer.forward_backward(batch, "ppoo").result()
    with pytest.raises(EngineError, match=r"ppo has no setting 'clip'; it has clip_high, clip_low"):
        trainer.forward_backward(batch, "ppo", clip=0.1).result()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "datum 1 has 0 tokens"),
        ([3] * 1025, "datum 1 has 1025 tokens; the model takes from 1 to"),
        ([3, 100_000], "datum 1 has the token 100000"),
        ([3, -1], "datum 1 has the token -1"),
    ],
)
def test_sequences_the_model_cannot_take_are_refused(subject, tokens, message):
    trainer = subject.trainer(subject.engine())
    batch = Batch([Datum([3, 4], [0, 1]), Datum(tokens, [0.0, *[1.0] * (len(tokens) - 1)][: len(tokens)])])
    for ask in (lambda: trainer.forward_backward(batch, "cross_entropy"), lambda: trainer.forward(batch)):
        with pytest.raises(EngineError, match=message):
            ask().result()


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_split(subject, batch, gradient, loss, tmp_path):
    begun = subject.trainer(subject.engine(), seed=1)
    learn(begun, batch, 1)  # an adapter's first half has no gradient before its second has moved
    weights = begun.save(tmp_path / "begun").result()
    found = []
    for tokens in (10_000, 12, 1):
        trainer = subject.trainer(subject.engine(micro_batch_tokens=tokens), init=weights)
        found.append((trainer.forward_backward(batch, loss).result(), gradient(trainer)))
    whole, whole_gradient = found[0]
    assert whole_gradient.norm() > 1e-3
    for result, split_gradient in found[1:]:
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        assert result.metrics == pytest.approx(whole.metrics, rel=1e-4)
        assert torch.allclose(whole_gradient, split_gradient, rtol=0, atol=1e-6)


def test_gradients_of_several_calls_add_up(subject, batch, gradient):
    once, twice = (subject.trainer(subject.engine(), seed=1) for _ in range(2))
    once.forward_backward(batch, "cross_entropy").result()
    for _ in range(2):
        twice.forward_backward(batch, "cross_entropy").result()
    torch.testing.assert_close(2 * gradient(once), gradient(twice), rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_mean_over_the_weight_of_the_batch(subject, batch):
    trainer = subject.trainer(subject.engine(micro_batch_tokens=9))
    result = trainer.forward_backward(batch, "cross_entropy").result()
    pairs = [
        (w, p) for d, row in zip(batch.data, result.logprobs, strict=True) for w, p in zip(d.weights, row, strict=True)
    ]
    assert result.loss == pytest.approx(-sum(w * p for w, p in pairs) / sum(w for w, _ in pairs), rel=1e-5)


def test_data_without_weight_changes_nothing(subject, batch, gradient):
    trainer, other = (subject.trainer(subject.engine(), seed=1) for _ in range(2))
    first = trainer.forward_backward(batch, "cross_entropy").result()
    silent = Batch([*batch.data, Datum([5, 5, 5], [0.0, 0.0, 0.0])])
    second = other.forward_backward(silent, "cross_entropy").result()
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert second.logprobs[-1] == [0.0, 0.0, 0.0]
    torch.testing.assert_close(gradient(trainer), gradient(other), rtol=1e-5, atol=1e-7)


def test_a_batch_of_nothing_but_zero_weights_has_loss_zero(subject):
    trainer = subject.trainer(subject.engine())
    before = trainer.fingerprint()
    assert trainer.forward_backward(Batch([Datum([3, 4], [0.0, 0.0])]), "cross_entropy").result().loss == 0
    assert trainer.optim_step(ADAM).result().grad_norm == 0
    assert trainer.fingerprint() == before


def test_a_loss_that_is_not_finite_is_refused_and_leaves_no_gradient(subject, batch):
    trainer = subject.trainer(subject.engine(micro_batch_tokens=1))
    broken = Datum([7, 7], [0.0, 1.0], {"sampling_logprobs": [0.0, -1.0], "advantages": [0.0, float("nan")]})
    before = trainer.fingerprint()
    with pytest.raises(TrainingError, match="importance_sampling is nan"):
        trainer.forward_backward(Batch([*batch.data, broken]), "importance_sampling").result()
    assert trainer.optim_step(ADAM).result().grad_norm == 0
    assert trainer.fingerprint() == before


def test_a_gradient_that_is_not_finite_is_refused_and_the_weights_stay(subject, batch):
    trainer = subject.trainer(subject.engine())
    before = trainer.fingerprint()
    trainer.forward_backward(batch, "cross_entropy").result()
    next(iter(trainer.parameters.values())).grad.fill_(float("inf"))
    with pytest.raises(TrainingError, match="the step was not taken"):
        trainer.optim_step(ADAM).result()
    assert trainer.fingerprint() == before
    assert trainer.optim_step(ADAM).result().grad_norm == 0


def test_the_gradient_is_clipped_once_to_the_norm_asked_for(subject, batch):
    trainer, other = (subject.trainer(subject.engine(), seed=1) for _ in range(2))
    trainer.forward_backward(batch, "cross_entropy").result()
    other.forward_backward(batch, "cross_entropy").result()
    norm = trainer.optim_step(AdamParams(learning_rate=0.0)).result().grad_norm
    clipped = other.optim_step(AdamParams(learning_rate=0.0, max_grad_norm=norm / 10)).result().grad_norm
    assert clipped == pytest.approx(norm)
    # After one step Adam's first moment is (1 - beta1) times the gradient it saw.
    moments = torch.cat([other.optimizer.state[p]["exp_avg"].flatten() for p in other.parameters.values()])
    assert float(moments.norm()) == pytest.approx(0.1 * norm / 10, rel=1e-4)


def test_trainers_on_one_base_do_not_disturb_each_other(subject, batch):
    alone = subject.trainer(subject.engine(), seed=1)
    expected = learn(alone, batch, 3), alone.fingerprint()
    engine = subject.engine()
    trainer, other = subject.trainer(engine, seed=1), subject.trainer(engine, seed=2)
    reversed_batch = Batch(batch.data[::-1][:3])
    seen = []
    for _ in range(3):
        other.forward_backward(reversed_batch, "cross_entropy").result()
        loss = trainer.forward_backward(batch, "cross_entropy").result().loss
        other.optim_step(AdamParams(learning_rate=0.05)).result()
        other.sampler().sample([[3]], SamplingParams(max_tokens=2)).result()
        seen.append((loss, trainer.optim_step(ADAM).result().grad_norm))
    assert (seen, trainer.fingerprint()) == expected


def test_the_base_is_bit_identical_after_ten_steps(subject, batch):
    engine = subject.engine()
    tensors = list(engine.base.parameters() if subject.name == "fake" else engine.loaded.model.parameters())
    copies = [tensor.clone() for tensor in tensors]
    rows = [datum.tokens for datum in batch.data]
    base = engine.sampler()
    before = base.logprobs(rows).result()
    learn(subject.trainer(engine), batch, 10)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert not any(tensor.requires_grad for tensor in tensors)
    assert base.logprobs(rows).result() == before == engine.sampler().logprobs(rows).result()


def test_the_same_seed_gives_the_same_start(subject):
    engine = subject.engine()
    torch.manual_seed(5)
    one = subject.trainer(engine, seed=4).fingerprint()
    torch.rand(3)
    assert subject.trainer(engine, seed=4).fingerprint() == one


def test_making_a_trainer_leaves_the_global_generator_alone(subject):
    engine = subject.engine()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    subject.trainer(engine, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_passes_give_the_same_log_probs(subject, batch):
    trainer = subject.trainer(subject.engine())
    assert trainer.forward(batch).result() == trainer.forward(batch).result()


def test_forward_and_forward_backward_see_the_same_policy_at_every_temperature(subject, batch):
    trainer = subject.trainer(subject.engine())
    for temperature in (0.7, 1.0, 1.5):
        learned = trainer.forward_backward(batch, "cross_entropy", temperature=temperature).result()
        scored = trainer.forward(batch, temperature=temperature).result()
        for a, b in zip(learned.logprobs, scored.logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_the_mean_entropy_is_that_of_the_whole_vocabulary(subject):
    engine = subject.engine()
    trainer = subject.trainer(engine)
    vocabulary = engine.base.logits.shape[1] if subject.name == "fake" else 512
    every = Batch([Datum([3, token], [0.0, 1.0]) for token in range(vocabulary)])
    logprobs = np.array([row[1] for row in trainer.forward(every).result().logprobs])
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-5)
    metrics = trainer.forward_backward(every, "cross_entropy").result().metrics
    assert metrics["entropy"] == pytest.approx(-(np.exp(logprobs) * logprobs).sum(), rel=1e-5)
