"""How far the distributions of one model are from another's, token by token, over the whole vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tercet.engine.outputs import Body
from tercet.models.logprobs import logits_of
from tercet.models.memory import CHUNK_TOKENS
from tercet.types import Batch, Datum


def divergences(
    ours: Callable[[], Body],
    theirs: Callable[[], Body],
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    temperature: float,
    max_tokens: int,
) -> list[list[float]]:
    """KL(ours || theirs) in nats, of the distribution of every token from `starts[i]` (at least 1) on.

    The models may take turns in the same memory: each is asked for once, and what it says is kept as hidden states.

    Args:
        ours: Gives the model whose distribution the mean is taken over.
        theirs: Gives the other.
        sequences: Token ids.
        starts: First place asked about in each sequence.
        temperature: Of both distributions; 0 is read as 1.
        max_tokens: Token budget of one pass.
    """
    if not sequences:
        return []
    with torch.no_grad():
        first, head = _hidden(ours(), sequences, starts, max_tokens)
        second, other_head = _hidden(theirs(), sequences, starts, max_tokens)
        divisor = temperature if temperature > 0 else 1.0
        flat: list[float] = []
        for p, q in zip(
            torch.split(torch.cat(first), CHUNK_TOKENS), torch.split(torch.cat(second), CHUNK_TOKENS), strict=True
        ):
            log_p = torch.log_softmax(head(p) / divisor, -1)
            log_q = torch.log_softmax(other_head(q) / divisor, -1)
            # A token that never comes costs nothing, even where the other model excludes it too.
            terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
            flat += terms.sum(-1).tolist()
    values = iter(flat)
    return [[next(values) for _ in tokens[start:]] for tokens, start in zip(sequences, starts, strict=True)]


def _hidden(
    body: Body, sequences: Sequence[Sequence[int]], starts: Sequence[int], max_tokens: int
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """For each sequence the hidden states that its tokens are predicted from, and what makes logits of them."""
    found: dict[int, Tensor] = {}
    for places in body.micro_batches(Batch([Datum(tokens, [0.0] * len(tokens)) for tokens in sequences]), max_tokens):
        hidden, paths = body.states([sequences[i] for i in places])
        for i, path in zip(places, paths, strict=True):
            found[i] = hidden[torch.from_numpy(path[starts[i] - 1 : -1]).to(body.device)]
    # Copied, as the next model may be put into the same memory.
    return [found[i] for i in range(len(sequences))], logits_of(copy.deepcopy(body.head), body.device)
