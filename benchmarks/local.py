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

    made = LocalEngine(load_model(work.model, dtype=work.dtype, device=work.device))
    if work.device == "cuda":
        from tercet.recipes.session import SetupConfig, micro_batch_tokens

        # As the verbs have it; the peers have all rows at once there.
        made.budgets.micro_batch_tokens = micro_batch_tokens(SetupConfig(lora=lora(work)), made.loaded)
    return made


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
    rows: Sequence[tuple[list[int], list[int]]], wide: int, long: int, device: str = "cpu"
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
    return tokens.to(device), attention.to(device), weights.to(device)


def datum(prompt: Sequence[int], answer: Sequence[int], **streams: Sequence[float]) -> Datum:
    """Learn the answer; streams speak of its tokens."""
    from tercet.types import Datum

    nothing = [0.0] * len(prompt)
    return Datum(
        [*prompt, *answer],
        [*nothing, *[1.0] * len(answer)],
        {name: [*nothing, *values] for name, values in streams.items()},
    )


def head_dim(config: Any) -> int:
    """Width of a head, which not every kind of config tells."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def learning_flops(model: Any, sequences: Sequence[Sequence[int]], predicted: int) -> float:
    """Operations that one forward and backward pass cannot do without, after merging prefixes.

    Of every token: two products with each frozen weight (forward, and the gradient of the input) and three with each of
    an adapter. Of every predicted token: two with the head. Of every pair of a token and one that it sees: two products
    of a head's size forward and four backward (arXiv:2204.02311, appendix B). What is computed again is not counted.
    """
    from tercet.engine.collate import forest

    packed = forest([list(sequence)[:-1] for sequence in sequences])
    tokens, pairs = len(packed.tokens), int((packed.positions + 1).sum())
    head = model.get_output_embeddings().weight.numel()
    linear = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n and p.ndim == 2)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    frozen = linear - embedding - (0 if tied else head)
    config = model.config
    width = config.num_hidden_layers * config.num_attention_heads * head_dim(config)
    return tokens * (4.0 * frozen + 6.0 * adapters) + 4.0 * predicted * head + 12.0 * pairs * width
