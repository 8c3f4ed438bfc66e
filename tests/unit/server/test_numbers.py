"""What numbers mean: those of AdamW, and the log-probs of what was drawn under top-p and top-k."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.errors import UsageError
from tercet.server.messages import MESSAGES
from tercet.server.requests import Adam
from tercet.types import AdamParams
from tests.unit.server.asking import Client, learning, sample, service_in, tell


def test_every_number_of_adam_reaches_the_engine():
    given = Adam(learning_rate=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5, grad_clip_norm=0.6)
    assert given.params() == AdamParams(
        learning_rate=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5, max_grad_norm=0.6
    )
    assert Adam().params() == AdamParams(
        learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, max_grad_norm=None
    )


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("learning_rate", (-0.1, math.inf, math.nan), "it must be finite and not below 0"),
        ("weight_decay", (-0.1, math.inf, math.nan), "it must be finite and not below 0"),
        ("beta1", (-0.1, 1.0, math.nan), "it must be from 0 to below 1"),
        ("beta2", (-0.1, 1.0, math.nan), "it must be from 0 to below 1"),
        ("eps", (-1e-8, 0.0, math.inf, math.nan), "it must be finite and above 0"),
        ("grad_clip_norm", (-1.0, math.nan), "it must be above 0, or 0 not to clip"),
    ],
)
def test_numbers_under_which_adam_is_not_adam_are_refused(name: str, values: tuple[float, ...], wanted: str):
    for value in values:
        with pytest.raises(UsageError, match=f"{name} is {value}; {wanted}"):
            Adam(**{name: value}).params()


def test_a_refused_step_leaves_weights_and_gradient_and_the_next_one_uses_it(tmp_path: Path):
    numbers = {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.75, "weight_decay": 2.0}

    async def story(client: Client) -> None:
        model = await client.model(await client.session())

        async def ask(seq_id: int, **more: float) -> Any:
            asked = {"model_id": model, "seq_id": seq_id, "adam_params": {**numbers, **more}}
            return await client.do("optim_step", asked)

        await client.do("forward_backward", learning(model, 1, [0, 1]))
        refused = await ask(2, grad_clip_norm=-1.0)
        assert refused["error"] == "grad_clip_norm is -1.0; it must be above 0, or 0 not to clip"
        # The first step is the learning rate, towards the target. In the second, whose gradient is 0, what is there
        # shrinks by 0.1 * 2; the mean of gradients is 0.25 / 0.75 of the first one, that of squares 0.1875 / 0.4375.
        for seq_id in (3, 4):
            assert "metrics" in await ask(seq_id)
        away = 2 * (0.1 * 0.8 + 0.1 * (0.25 / 0.75) / math.sqrt(0.1875 / 0.4375))
        found = await client.logprobs(await client.sampler(model, 5, 0), 0, [0, 1])
        assert found[1] == pytest.approx(-math.log(1 + 3 * math.exp(-away)), abs=1e-5)

    tell(service_in(tmp_path), story)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, (1 / 2, 1 / 4, 1 / 8, 1 / 8)),
        ({"top_k": 2}, (2 / 3, 1 / 3)),
        ({"top_p": 0.7}, (2 / 3, 1 / 3)),
        ({"top_k": 2, "temperature": 0.5}, (4 / 5, 1 / 5)),
    ],
    ids=["plain", "top_k", "top_p", "both"],
)
def test_a_samples_logprobs_are_under_what_it_was_drawn_from_and_tables_under_the_temperature_alone(
    tmp_path: Path, params: dict[str, float], wanted: tuple[float, ...]
):
    logits = torch.zeros(4, 4)
    logits[0] = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log()
    whole = [0.5 ** (1 / params.get("temperature", 1)), 0.25 ** (1 / params.get("temperature", 1))]
    total = whole[0] + whole[1] + 2 * 0.125 ** (1 / params.get("temperature", 1))

    async def story(client: Client) -> None:
        asked = {"max_tokens": 1, "seed": 0, **params}
        sampler = await client.base_sampler(await client.session())
        more = {"sampling_params": asked, "num_samples": 32, "topk_sample_logprobs": 2}
        message = MESSAGES["SampleResponse"]()
        message.ParseFromString(await client.do("asample", sample(sampler, 0, [0], **more)))
        drawn: dict[int, float] = {}
        for each in message.sequences:
            [token], [logprob] = np.frombuffer(each.tokens, "<i4"), np.frombuffer(each.logprobs, "<f4")
            drawn[int(token)] = float(logprob)
            table = np.frombuffer(each.topk_sampled_logprobs.logprobs, "<f4")
            assert table == pytest.approx([math.log(p / total) for p in whole], abs=1e-5)
        assert drawn == pytest.approx({token: math.log(p) for token, p in enumerate(wanted)}, abs=1e-5)

    tell(service_in(tmp_path, logits), story)
