"""The likeliest tokens at every place of given sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tercet.engine.outputs import Body
from tercet.errors import EngineError
from tercet.models.logprobs import logits_of
from tercet.models.memory import CHUNK_TOKENS
from tercet.types import Batch, Datum, TopLogprobs


def top_logprobs(
    body: Body,
    sequences: Sequence[Sequence[int]],
    k: int,
    starts: Sequence[int] | None = None,
    *,
    temperature: float = 1.0,
    max_tokens: int,
) -> list[TopLogprobs]:
    """For every token of each sequence from its start on, the `k` tokens that were likeliest in its place.

    Args:
        body: The model.
        sequences: Token ids.
        k: How many; the whole vocabulary when it is smaller.
        starts: First place asked about in each sequence; 1 by default, as nothing comes before the first token.
        temperature: Of the distribution; 0 is read as 1.
        max_tokens: Token budget of one pass.

    Raises:
        EngineError: A sequence is empty, longer than the model takes, or has a token that the model does not know.
    """
    vocabulary = body.head.out_features
    for i, tokens in enumerate(sequences):
        if not 0 < len(tokens) <= body.context_tokens:
            raise EngineError(f"sequence {i} has {len(tokens)} tokens; the model takes from 1 to {body.context_tokens}")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise EngineError(f"sequence {i} has a token that the model does not know; it knows 0 to {vocabulary - 1}")
    begins = [1] * len(sequences) if starts is None else [max(1, start) for start in starts]
    divisor = temperature if temperature > 0 else 1.0
    found: list[TopLogprobs] = [[] for _ in sequences]
    batch = Batch([Datum(tokens, [0.0] * len(tokens)) for tokens in sequences])
    with torch.inference_mode():
        logits = logits_of(body.head, body.device)
        for places in body.micro_batches(batch, max_tokens):
            hidden, paths = body.states([sequences[i] for i in places])
            for i, path in zip(places, paths, strict=True):
                asked = torch.from_numpy(path[begins[i] - 1 : -1]).to(body.device)
                for part in torch.split(hidden[asked], CHUNK_TOKENS):
                    top = torch.log_softmax(logits(part) / divisor, -1).topk(min(k, vocabulary))
                    found[i] += [
                        list(zip(*pair, strict=True))
                        for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                    ]
    return found
