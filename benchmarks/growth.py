"""How the time of a gradient step grows: with the tokens, with the length of rows, and with the size of groups at a
fixed number of tokens."""

from __future__ import annotations

import math

from local import datum, engine, lora
from measuring import Once, Row, Run, Work, timed


def slope(sizes: list[float], seconds: list[float]) -> float:
    """Of the straight line through log seconds over log size."""
    xs, ys = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - middle_x) ** 2 for x in xs)


def _grown(work: Work, batches: list[tuple[float, list[tuple[list[int], list[int]]]]]) -> Once:
    """Each batch once, one after another; how the time grows with the number that stands before it."""
    from tercet.types import Batch

    trainer = engine(work).trainer(lora=lora(work))
    ready = [(size, Batch([datum(prompt, answer) for prompt, answer in rows])) for size, rows in batches]
    trainer.forward_backward(ready[0][1], "cross_entropy").result()

    def once() -> Run:
        seconds = []
        for _, batch in ready:
            trainer.optimizer.zero_grad()
            seconds.append(timed(lambda batch=batch: trainer.forward_backward(batch, "cross_entropy").result())[0])
        tokens = sum(len(d.tokens) for _, batch in ready for d in batch.data)
        return Run(sum(seconds), tokens, 0.0, {"slope": slope([size for size, _ in ready], seconds)})

    return once


def _row(work: Work, prompt: int, answer: int, length: int) -> tuple[list[int], list[int]]:
    """A prompt and an answer, each half the length, that no other number gives."""
    flat = [token for group in work.groups for tokens in group["answers"] for token in tokens]
    half = length // 2

    def taken(start: int) -> list[int]:
        return [flat[(start + i) % len(flat)] for i in range(half)]

    return taken(17 * prompt), taken(31 * answer)


def tokens(work: Work) -> Once:
    """Rows of 128 tokens, more and more of them."""
    length = 128 if not work.smoke else 8
    batches = [
        (float(total), [_row(work, i, i, length) for i in range(total // length)])
        for total in work.settings["growth_tokens"]
    ]
    return _grown(work, batches)


def group_size(work: Work) -> Once:
    """As many rows of the same length every time, in larger and larger groups."""
    length, answers = (128 if not work.smoke else 8), work.settings["growth_answers"]
    batches = [
        (float(size), [_row(work, i // size, i, length) for i in range(answers)])
        for size in work.settings["growth_groups"]
    ]
    return _grown(work, batches)


def length(work: Work) -> Once:
    """As many rows every time, longer and longer, in the engine's own budget of tokens."""
    rows = range(work.settings["growth_rows"])
    batches = [(float(each), [_row(work, i, i, each) for i in rows]) for each in work.settings["growth_lengths"]]
    return _grown(work, batches)


TOKENS = Row("tokens", "growth: seconds over tokens", {"tercet": tokens}, target=1.1, of="slope")
GROUP_SIZE = Row(
    "group-size", "growth: seconds over group size, as many tokens", {"tercet": group_size}, 1.1, of="slope"
)
LENGTH = Row("length", "growth: seconds over the length of 4 rows", {"tercet": length}, target=1.1, of="slope")
