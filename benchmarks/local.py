"""Our side: the engine, an adapter with known weights, batches from the work, and what they cost in arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from measuring import Work

if TYPE_CHECKING:
    import torch

    from tercet.engine.local import LocalEngine
    from tercet.types import Datum, LoraConfig


def engine(work: Work) -> LocalEngine:
    from tercet.engine.local import LocalEngine
    from tercet.models.load import load_model

    return LocalEngine(load_model(work.model))


def lora(work: Work) -> LoraConfig:
    from tercet.types import LoraConfig

    return LoraConfig(rank=work.settings["rank"], alpha=2 * work.settings["rank"])


def fill_adapter(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """The same adapter on every side: B would be 0 at the start, and A without a gradient."""
    import torch

    generator = torch.Generator().manual_seed(0)
    named: dict[tuple[str, str], torch.nn.Parameter] = {}
    for name, parameter in parameters:
        layer, _, matrix = name.partition(".lora_")
        named[layer.split("layers.")[-1], matrix[0]] = parameter
    with torch.no_grad():
        for key in sorted(named):
            named[key].copy_(0.02 * torch.randn(named[key].shape, generator=generator))


def gradient_numbers(parameters: Iterable[torch.nn.Parameter]) -> dict[str, float]:
    """The gradient's norm in double precision."""
    import torch

    squares = [p.grad.double().pow(2).sum() for p in parameters if p.grad is not None]
    return {"gradient_norm": float(torch.stack(squares).sum().sqrt())}


def rows_of_groups(work: Work) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every row."""
    return [(group["prompt"], answer) for group in work.groups for answer in group["answers"]]


def laid_out(
    rows: Sequence[tuple[list[int], list[int]]], wide: int, long: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and attention mask (B, wide + long), weights of answers (B, long): prompts end where answers begin."""
    import torch

    tokens, attention = (torch.zeros(len(rows), wide + long, dtype=torch.long) for _ in range(2))
    weights = torch.zeros(len(rows), long)
    for i, (prompt, answer) in enumerate(rows):
        place = slice(wide - len(prompt), wide + len(answer))
        tokens[i, place] = torch.tensor([*prompt, *answer])
        attention[i, place] = 1
        weights[i, : len(answer)] = 1
    return tokens, attention, weights


def datum(prompt: Sequence[int], answer: Sequence[int], **streams: Sequence[float]) -> Datum:
    """Learn the answer; streams speak of its tokens."""
    from tercet.types import Datum

    nothing = [0.0] * len(prompt)
    return Datum(
        [*prompt, *answer],
        [*nothing, *[1.0] * len(answer)],
        {name: [*nothing, *values] for name, values in streams.items()},
    )


def learning_flops(model: Any, sequences: Sequence[Sequence[int]], predicted: int) -> float:
    """Operations of one forward and backward pass, adapters and attention left out.

    Frozen weights cost a product forward and one backward for every token after merging prefixes; the head the same for
    every predicted token.
    """
    from tercet.engine.collate import forest

    tokens = len(forest([list(sequence)[:-1] for sequence in sequences]).tokens)
    head = model.get_output_embeddings().weight.numel()
    linear = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n and p.ndim == 2)
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return 4.0 * tokens * (linear - embedding - (0 if tied else head)) + 4.0 * predicted * head
