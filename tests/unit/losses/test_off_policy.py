"""DRO and GSPO in float64 against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tercet.losses.off_policy import dro_loss, gspo_loss


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_(True)


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_dro_pulls_back_by_the_square_of_the_log_ratio():
    logprobs = logs((0.5, 0.25))
    values, metrics = dro_loss(
        logprobs, sampling_logprobs=logs((0.25, 0.25)).detach(), advantages=numbers((2, -1)), beta=0.5
    )
    values.sum().backward()
    ln2 = math.log(2)
    # -(log p A - beta / 2 d^2) with d = ln 2 and 0; its slope is -(A - beta d).
    assert values.tolist()[0] == pytest.approx([2 * ln2 + 0.25 * ln2**2, -2 * ln2])
    assert logprobs.grad.tolist()[0] == pytest.approx([-2 + 0.5 * ln2, 1.0])
    assert metrics["log_ratio"].tolist()[0] == pytest.approx([ln2, 0.0])


def test_gspo_gives_every_token_the_geometric_mean_of_its_sequences_ratios():
    logprobs = logs((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    # Ratios 4 and 1 make a sequence's 2, cut at 1.5; the third token does not count. Below, 1/2 and 1/2 make 1/2.
    values, metrics = gspo_loss(
        logprobs, sampling_logprobs=logs((0.125, 0.5, 0.01), (1.0, 0.5, 0.5)).detach(),
        advantages=numbers((1, 1, 0), (-1, 2, 0)), sequence_ratio_mask=numbers((1, 1, 0), (1, 1, 0)), clip_high=0.5,
    )  # fmt: skip
    values.sum().backward()
    assert metrics["ratio"][:, :2].tolist() == [pytest.approx([2.0, 2.0]), pytest.approx([0.5, 0.5])]
    # A good token above the bound is cut and stops learning; a bad one below 0.8 is cut too, a good one is not.
    assert values.tolist() == [pytest.approx([-1.5, -1.5, 0.0]), pytest.approx([0.8, -1.0, 0.0])]
    assert logprobs.grad.tolist() == [pytest.approx([0.0, 0.0, 0.0]), pytest.approx([0.0, -1.0, 0.0])]
