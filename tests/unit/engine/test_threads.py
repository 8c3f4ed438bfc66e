"""With several threads a gradient is the same, to the bit, every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tercet.engine.fake import FakeEngine
from tercet.types import Batch, Datum


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_what_falls_on_one_token_is_summed_in_one_order(two_threads):
    random = np.random.default_rng(0)
    rows = [Datum([i % 7, *random.integers(0, 300, 40).tolist()], [0.0] + [1.0] * 40) for i in range(60)]

    def gradient() -> torch.Tensor:
        trainer = FakeEngine(vocabulary=300).trainer()
        trainer.forward_backward(Batch(rows), "cross_entropy").result()
        grad = trainer.table.logits.grad
        assert grad is not None
        return grad.clone()

    first = gradient()
    assert first.abs().max() > 0
    assert all(torch.equal(gradient(), first) for _ in range(15))
