from __future__ import annotations

import pytest

from tercet.algorithms.steps import rows_of_step
from tercet.engine.fake import FakeEngine
from tercet.errors import CheckpointError
from tercet.recipes.reference import reference_logprobs, rows_reached
from tercet.types import AdamParams, Batch, Datum

DATA = [Datum([0, arm, 1], [0.0, 1.0, 1.0]) for arm in range(3)]


def changed(trainer):
    """The trainer after a step."""
    trainer.forward_backward(Batch(DATA), "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=0.5)).result()
    return trainer


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (3, 1), (4, 1), (9, 2)])
def test_the_rows_that_are_reached_are_those_the_steps_take(steps, epochs):
    taken = {row for step in range(steps) for row in rows_of_step(range(10), step, 3, seed=4, epochs=epochs)}
    assert rows_reached(10, steps, 3, epochs, seed=4) == sorted(taken)


def test_what_was_computed_is_read_back_exactly(tmp_path):
    trainer, said = FakeEngine(vocabulary=3).trainer(), []
    first = reference_logprobs(tmp_path, trainer, DATA, say=said.append)
    assert first == trainer.forward(Batch(DATA)).result().logprobs
    assert reference_logprobs(tmp_path, trainer, DATA, say=said.append) == first
    assert ["computed once" in said[0], "read from" in said[1]] == [True, True]


def test_a_policy_that_has_learned_is_no_reference_any_more(tmp_path):
    trainer = FakeEngine(vocabulary=3).trainer()
    reference_logprobs(tmp_path, trainer, DATA, say=str)
    with pytest.raises(CheckpointError, match="its weights differ"):
        reference_logprobs(tmp_path, changed(trainer), DATA, say=str)


OTHERS = [({"temperature": 0.5}, "temperature"), ({"data": DATA[:2]}, "rows"), ({"data": DATA[::-1]}, "rows")]


@pytest.mark.parametrize(("change", "what"), OTHERS)
def test_the_reference_of_another_run_is_refused(tmp_path, change, what):
    trainer = FakeEngine(vocabulary=3).trainer()
    reference_logprobs(tmp_path, trainer, DATA, say=str)
    with pytest.raises(CheckpointError, match=f"its {what} differ"):
        reference_logprobs(tmp_path, trainer, **{"data": DATA, "say": str, **change})


def test_a_damaged_file_is_named(tmp_path):
    trainer = FakeEngine(vocabulary=3).trainer()
    (tmp_path / "reference.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"reference.safetensors cannot be read: .*delete it"):
        reference_logprobs(tmp_path, trainer, DATA, say=str)
