"""What a model says of sequences: log-probs, entropies, values and scores.

Every shared prefix is computed once where the model takes a packed forest; otherwise rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tercet.engine.collate import Forest, IntArray, forest, micro_batches, padded_micro_batches
from tercet.errors import EngineError
from tercet.models.frozen_llama import FrozenLlama, Updates, frozen_llama
from tercet.models.logprobs import token_logprobs
from tercet.models.memory import SPAN_TOKENS
from tercet.models.padded import OwnHead, padded_hidden
from tercet.models.tree_attention import ForestLayout, Layout, span
from tercet.types import Batch


@dataclass(frozen=True)
class Body:
    """A causal language model's parts: tokens -> hidden states, hidden states -> logits, and perhaps -> a number."""

    trunk: nn.Module
    head: nn.Linear | OwnHead
    device: torch.device
    context_tokens: int
    value_head: nn.Linear | None = None
    whole: PreTrainedModel | None = None
    """The model itself, when it takes no packed forest."""
    updates: Updates = field(default_factory=dict)
    """What the weights lack of an adapter; only `fast` adds it."""

    def micro_batches(self, batch: Batch, max_tokens: int) -> Iterator[list[int]]:
        """Indices of a batch's data in pieces of at most `max_tokens` tokens as they are computed, pairs together."""
        return (micro_batches if self.whole is None else padded_micro_batches)(batch, max_tokens)

    def states(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Sequence[IntArray]]:
        """Last hidden states (T, D) of sequences, and for each where those of its tokens are."""
        if self.whole is None:
            packed = forest(sequences)
            return self.hidden(packed.tokens, packed.positions, forest_layout(packed, self.device)), packed.paths
        hidden = padded_hidden(self.trunk, sequences, self.device)
        starts = range(0, len(sequences) * hidden.shape[1], hidden.shape[1])
        places = [start + np.arange(len(tokens)) for start, tokens in zip(starts, sequences, strict=True)]
        return hidden.flatten(0, 1), places

    def fast(self) -> FrozenLlama | None:
        """The form in which the model says most quickly what its weights make of tokens, if it has one."""
        return frozen_llama(self.trunk, self.head, self.updates)

    def _fast_where_nothing_learns(self) -> FrozenLlama | None:
        return None if torch.is_grad_enabled() or self.head.weight.requires_grad else self.fast()

    def hidden(self, tokens: IntArray, positions: IntArray, layout: Layout) -> Tensor:
        """Last hidden states (T, D) of one packed row (T,)."""
        row, places = torch.from_numpy(tokens).to(self.device), torch.from_numpy(positions).to(self.device)
        fast = self._fast_where_nothing_learns()
        return self.hidden_of(row, places, layout) if fast is None else fast.packed(row, places, layout)

    def hidden_of(self, row: Tensor, places: Tensor, layout: Layout) -> Tensor:
        """The same of tensors (T,) on the model's device, of which a layout has no other places than theirs."""
        fast = self._fast_where_nothing_learns()
        if fast is not None:
            return fast.hidden(row, places, layout)
        if self.updates:
            raise EngineError(
                "these weights are an adapter's and are merged where nothing learns; this wants a gradient"
            )
        out = self.trunk(input_ids=row[None], position_ids=places[None], use_cache=False, layout=layout)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def values(self, hidden: Tensor) -> Tensor:
        """The head's number for hidden states (N, D), in float32 or finer."""
        assert self.value_head is not None
        value: Tensor = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        return value


def forest_layout(packed: Forest, device: torch.device) -> Layout:
    """How a packed forest attends: as one kernel on CUDA, span by span elsewhere."""
    if device.type != "cuda":
        return span_layout(packed, device)
    # Not above: its import takes longer than everything a CPU needs.
    from tercet.models.flex import FlexLayout

    return FlexLayout(torch.from_numpy(packed.subtree_end).to(device), lambda: span_layout(packed, device))


def span_layout(packed: Forest, device: torch.device) -> ForestLayout:
    """How a packed forest attends, span by span."""
    ends = torch.from_numpy(packed.subtree_end)
    return ForestLayout(
        tuple(span(unit.start, unit.end, unit.ancestors, ends).to(device) for unit in packed.units(SPAN_TOKENS))
    )


def outputs(
    body: Body,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[IntArray],
    kinds: Collection[str],
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> dict[str, Tensor]:
    """What the model says where it is asked.

    Args:
        body: The model.
        sequences: Token ids.
        wanted: For each sequence the positions t >= 1 that are asked about; what is said of the token at t comes from
            the hidden state at t - 1.
        kinds: Of `logprobs`, `entropies`, `values` (of the wanted tokens of all sequences, one after another, (N,)) and
            `scores` (one a sequence, at its last token).
        temperature: Of the distribution.
        entropy_gradient: Whether entropies are learned from.
    """
    whole = "scores" in kinds
    # Nothing is predicted from a sequence's last token, so unless it is scored it is not computed: both labels of a
    # pair become one path.
    hidden, paths = body.states([tokens if whole or len(tokens) == 1 else tokens[:-1] for tokens in sequences])
    sources = _indices([path[t - 1] for path, t in zip(paths, wanted, strict=True)]).to(body.device)
    said: dict[str, Tensor] = {}
    # `index_select` and not brackets, whose gradient sums what falls on one token in the order in which threads come.
    if "logprobs" in kinds or "entropies" in kinds:
        targets = [np.asarray(tokens, dtype=np.int64)[t] for tokens, t in zip(sequences, wanted, strict=True)]
        said["logprobs"], said["entropies"] = token_logprobs(
            hidden.index_select(0, sources),
            _indices(targets).to(body.device),
            body.head,
            temperature,
            entropy_gradient=entropy_gradient,
        )
    if "values" in kinds:
        said["values"] = body.values(hidden.index_select(0, sources))
    if whole:
        ends = torch.tensor([int(path[-1]) for path in paths]).to(body.device)
        said["scores"] = body.values(hidden.index_select(0, ends))
    return said


def _indices(parts: Sequence[IntArray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
