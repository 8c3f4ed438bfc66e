"""Gradient of groups of answers to one prompt: prefix tries against padded rows of the same model and adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp
from typing import TYPE_CHECKING, Any
from zlib import crc32

from local import datum, engine, fill_adapter, gradient_numbers, laid_out, learning_flops, lora, rows_of_groups
from measuring import Once, Row, Run, Work, timed

if TYPE_CHECKING:
    import torch


# In float32 transformers' own gradient is 1e-4 of its length off the one in float64, ours 1e-5; a product with a random
# vector has three times that now and then.
TOLERANCES = {"gradient_direction": 5e-4}


def tries(work: Work) -> Once:
    from tercet.types import Batch

    base = engine(work)
    trainer = base.trainer(lora=lora(work))
    fill_adapter(trainer.parameters.items())
    rows = rows_of_groups(work)
    batch = Batch([datum(prompt, answer) for prompt, answer in rows])
    predicted = sum(len(answer) for _, answer in rows)
    flops = learning_flops(base.model, [d.tokens for d in batch.data], predicted)

    def once() -> Run:
        trainer.optimizer.zero_grad()
        seconds, step = timed(lambda: trainer.forward_backward(batch, "cross_entropy").result())
        same = {"loss": step.loss, **of_gradient(trainer.parameters)}
        return Run(seconds, sum(len(d.tokens) for d in batch.data), flops, same)

    return once


def of_gradient(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """What a gradient that points elsewhere, or is longer, does not share.

    The direction is its product with a random vector, drawn for each name, over its norm: a number around 0 with spread
    1. Its exponential is given, of which a relative difference is the product's difference in norms.
    """
    import torch

    found = gradient_numbers(parameters.values())
    product = 0.0
    for name, parameter in parameters.items():
        place = name.split("layers.")[-1].replace(".default", "")
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(place.encode())))
        product += float((parameter.grad.double() * drawn).sum()) if parameter.grad is not None else 0.0
    return {**found, "gradient_direction": exp(product / found["gradient_norm"])}


def padded_rows(work: Work) -> Once:
    """As TRL lays a batch out: prompts padded on the left, answers on the right, the head on all places of answers."""
    rows = rows_of_groups(work)
    wide = max(len(prompt) for prompt, _ in rows)
    long = max(len(answer) for _, answer in rows)

    def loss(model: Any, part: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        tokens, attention, weights = laid_out(part, wide, long)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=tokens, attention_mask=attention, position_ids=positions, logits_to_keep=long + 1
        ).logits
        return -(logprobs_of(logits[:, :-1], tokens[:, -long:]) * weights).sum()

    return _padded(work, rows, loss)


def sorted_rows(work: Work) -> Once:
    """Rows in order of length, padded on the right to the longest of a few, the head on answers alone: what a trainer
    can save without tries."""
    import torch

    def loss(model: Any, part: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        tokens, attention, _ = laid_out([([], [*p, *a]) for p, a in part], 0, max(len(p) + len(a) for p, a in part))
        answers = torch.zeros_like(attention, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(part):
            answers[i, len(prompt) : len(prompt) + len(answer)] = True
        plain = model.get_base_model()
        hidden = plain.get_decoder()(input_ids=tokens, attention_mask=attention).last_hidden_state
        logits = plain.get_output_embeddings()(hidden[:, :-1][answers[:, 1:]])
        return -logprobs_of(logits, tokens[answers]).sum()

    return _padded(work, sorted(rows_of_groups(work), key=lambda row: len(row[0]) + len(row[1])), loss)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token under the logits that predict it."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _padded(
    work: Work,
    rows: list[tuple[list[int], list[int]]],
    summed: Callable[[Any, list[tuple[list[int], list[int]]]], torch.Tensor],
) -> Once:
    """A few rows at a time, of which a function gives the summed loss."""
    from trl_steps import peft_model

    model = peft_model(work)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fill_adapter(parameters.items())
    size = work.settings["micro_batch_rows"]
    pieces = [rows[at : at + size] for at in range(0, len(rows), size)]
    predicted = sum(len(answer) for _, answer in rows)

    def step() -> float:
        total = 0.0
        for piece in pieces:
            loss = summed(model, piece) / predicted
            loss.backward()
            total += float(loss.detach())
        return total

    def once() -> Run:
        model.zero_grad()
        seconds, loss = timed(step)
        return Run(seconds, sum(len(p) + len(a) for p, a in rows), 0.0, {"loss": loss, **of_gradient(parameters)})

    return once


ROW = Row(
    "gradient",
    "gradient step on groups of 4, against padded rows",
    {"tercet": tries, "padded": padded_rows},
    target=2.7,
    tolerances=TOLERANCES,
)
SORTED = Row(
    "gradient-sorted",
    "the same against rows sorted by length",
    {"tercet": tries, "sorted": sorted_rows},
    target=1.0,
    tolerances=TOLERANCES,
)
