"""Gradient of groups of answers to one prompt: prefix tries against padded rows of the same model and adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from local import datum, engine, fill_adapter, gradient_numbers, laid_out, learning_flops, lora, rows_of_groups
from measuring import Once, Row, Run, Work, timed


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
        same = {"loss": step.loss, **gradient_numbers(trainer.parameters.values())}
        return Run(seconds, sum(len(d.tokens) for d in batch.data), flops, same)

    return once


def padded_rows(work: Work) -> Once:
    """As TRL lays a batch out: prompts padded on the left, answers on the right, the head on all places of answers."""
    rows = rows_of_groups(work)
    wide = max(len(prompt) for prompt, _ in rows)
    long = max(len(answer) for _, answer in rows)
    return _padded(work, rows, lambda part: laid_out(part, wide, long))


def sorted_rows(work: Work) -> Once:
    """Rows in order of length, padded to the longest of a few: what a trainer can save without tries."""
    rows = sorted(rows_of_groups(work), key=lambda row: len(row[0]) + len(row[1]))
    return _padded(work, rows, lambda part: laid_out(part, *(max(map(len, side)) for side in zip(*part, strict=True))))


def _padded(work: Work, rows: list[tuple[list[int], list[int]]], lay_out: Callable[..., Any]) -> Once:
    import torch
    from trl_steps import peft_model

    model = peft_model(work)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fill_adapter(parameters)
    size = work.settings["micro_batch_rows"]
    pieces = [lay_out(rows[at : at + size]) for at in range(0, len(rows), size)]
    predicted = sum(len(answer) for _, answer in rows)

    def step() -> float:
        total = 0.0
        for tokens, attention, weights in pieces:
            answers = weights.shape[1]
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            logits = model(
                input_ids=tokens, attention_mask=attention, position_ids=positions, logits_to_keep=answers + 1
            ).logits
            logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, -answers:, None])[..., 0]
            loss = -(logprobs * weights).sum() / predicted
            loss.backward()
            total += float(loss.detach())
        return total

    def once() -> Run:
        model.zero_grad()
        seconds, loss = timed(step)
        same = {"loss": loss, **gradient_numbers(p for _, p in parameters)}
        return Run(seconds, sum(len(p) + len(a) for p, a in rows), 0.0, same)

    return once


ROW = Row(
    "gradient",
    "gradient step on groups of 4, against padded rows",
    {"tercet": tries, "padded": padded_rows},
    target=2.7,
)
SORTED = Row(
    "gradient-sorted",
    "the same against rows sorted by length",
    {"tercet": tries, "sorted": sorted_rows},
    target=1.0,
)
