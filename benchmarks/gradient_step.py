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

    from tercet.engine.local import LocalEngine


# In float32 transformers' own gradient is 1e-4 of its length off the one in float64, ours 1e-5; a product with a random
# vector has three times that now and then.
TOLERANCES = {"gradient_direction": 5e-4}


Step = Callable[[], float]
"""A gradient step; its loss."""


def tries(work: Work) -> Once:
    base = engine(work)
    step, parameters = trie_step(work, base)
    rows = rows_of_groups(work)
    flops = learning_flops(base.model, [[*p, *a] for p, a in rows], sum(len(answer) for _, answer in rows))
    return _once(rows, step, parameters, flops)


def trie_step(work: Work, base: LocalEngine) -> tuple[Step, Mapping[str, torch.nn.Parameter]]:
    """Our step, and the adapter that has the gradient."""
    from tercet.types import Batch

    trainer = base.trainer(lora=lora(work))
    fill_adapter(trainer.parameters.items())
    batch = Batch([datum(prompt, answer) for prompt, answer in rows_of_groups(work)])
    return lambda: trainer.forward_backward(batch, "cross_entropy").result().loss, trainer.parameters


def _once(
    rows: list[tuple[list[int], list[int]]],
    step: Step,
    parameters: Mapping[str, torch.nn.Parameter],
    flops: float = 0.0,
) -> Once:
    def once() -> Run:
        for parameter in parameters.values():
            parameter.grad = None
        seconds, loss = timed(step)
        return Run(seconds, sum(len(p) + len(a) for p, a in rows), flops, {"loss": loss, **of_gradient(parameters)})

    return once


def place_of(name: str) -> str:
    """What a parameter of an adapter is called on both sides."""
    return name.split("layers.")[-1].replace(".default", "")


def of_gradient(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """What a gradient that points elsewhere, or is longer, does not share.

    The direction is its product with a random vector, drawn for each name, over its norm: a number around 0 with spread
    1. Its exponential is given, of which a relative difference is the product's difference in norms.
    """
    import torch

    found = gradient_numbers(parameters.values())
    product = 0.0
    for name, parameter in parameters.items():
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(place_of(name).encode())))
        product += float((parameter.grad.double().cpu() * drawn).sum()) if parameter.grad is not None else 0.0
    return {**found, "gradient_direction": exp(product / found["gradient_norm"])}


def padded_rows(work: Work) -> Once:
    from trl_steps import peft_model

    return _once(rows_of_groups(work), *padded_step(work, peft_model(work)))


def padded_step(work: Work, model: Any) -> tuple[Step, Mapping[str, torch.nn.Parameter]]:
    """As TRL lays a batch out: prompts padded on the left, answers on the right, the head on all places of answers."""
    rows = rows_of_groups(work)
    wide = max(len(prompt) for prompt, _ in rows)
    long = max(len(answer) for _, answer in rows)

    def loss(model: Any, part: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        tokens, attention, weights = laid_out(part, wide, long, work.device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=tokens, attention_mask=attention, position_ids=positions, logits_to_keep=long + 1
        ).logits
        return -(logprobs_of(logits[:, :-1], tokens[:, -long:]) * weights).sum()

    return _padded(work, model, rows, loss)


def sorted_rows(work: Work) -> Once:
    """Rows in order of length, padded on the right to the longest of a few, the head on answers alone: what a trainer
    can save without tries."""
    import torch
    from trl_steps import peft_model

    def loss(model: Any, part: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        whole = [([], [*p, *a]) for p, a in part]
        tokens, attention, _ = laid_out(whole, 0, max(len(text) for _, text in whole), work.device)
        answers = torch.zeros_like(attention, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(part):
            answers[i, len(prompt) : len(prompt) + len(answer)] = True
        plain = model.get_base_model()
        hidden = plain.get_decoder()(input_ids=tokens, attention_mask=attention).last_hidden_state
        logits = plain.get_output_embeddings()(hidden[:, :-1][answers[:, 1:]])
        return -logprobs_of(logits, tokens[answers]).sum()

    rows = sorted(rows_of_groups(work), key=lambda row: len(row[0]) + len(row[1]))
    return _once(rows, *_padded(work, peft_model(work), rows, loss))


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token under the logits that predict it, in float32 or finer."""
    logits = logits if logits.element_size() > 4 else logits.float()
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _padded(
    work: Work,
    model: Any,
    rows: list[tuple[list[int], list[int]]],
    summed: Callable[[Any, list[tuple[list[int], list[int]]]], torch.Tensor],
) -> tuple[Step, Mapping[str, torch.nn.Parameter]]:
    """A few rows at a time, of which a function gives the summed loss; and the adapter that has the gradient."""
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

    return step, parameters


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
MFU = Row(
    "mfu",
    "operations of the gradient step over the GEMM peak of its dtype",
    {"tercet": tries},
    target=0.45,
    of="arithmetic",
)
