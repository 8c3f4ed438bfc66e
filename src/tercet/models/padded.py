"""Models that take no packed forest: right-padded rows through transformers' own forward.

Slower than a forest, and right for whatever mixes tokens: windows, states, convolutions, capped scores, code that came
with the model. What they must keep to is found out by trying, when they are loaded: see `has_plain_head`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tercet.errors import ModelError

# Of the largest number. Half precision rounds to a few thousandths a layer.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
TRIED_TOKENS = (11, 23)


def padded_hidden(trunk: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Last hidden states (B, T, D) of rows padded on the right; what lies beyond a row's end means nothing."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.as_tensor(row), 1
    hidden: Tensor = trunk(
        input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
    ).last_hidden_state
    return hidden


class OwnHead(nn.Module):
    """Hidden states -> logits by the model's own forward, whatever it does around its linear layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Share the head's weights with a model."""
        super().__init__()
        untyped: Any = model
        self.linear = untyped.get_output_embeddings()
        # The same model with nothing in the place of its layers: what is given as embeddings comes out of them.
        self.shell: Any = copy.copy(model)
        self.shell._modules = {**model._modules, model.base_model_prefix: _Given()}

    @property
    def weight(self) -> Tensor:
        """Of the linear layer (V, D)."""
        weight: Tensor = self.linear.weight
        return weight

    @property
    def in_features(self) -> int:
        """Numbers in a hidden state."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Tokens in the vocabulary."""
        return int(self.weight.shape[0])

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D)."""
        logits: Tensor = self.shell(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class _Given(nn.Module):
    """Layers that do nothing."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutput:
        return _Output(last_hidden_state=inputs_embeds)


class _Output(BaseModelOutput):
    """A trunk's output; of caches and whatever else a model may pass on there is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel, name: str) -> bool:
    """Try a model with right-padded rows; whether its logits are what its linear head gives, and nothing more.

    Raises:
        ModelError: It cannot be used so: it fails, a row depends on the padding, a token on later ones, or its logits
            do not follow from the last hidden states.
    """
    if not model.can_generate():
        raise ModelError(f"{name} has no generate of its own, and without a packed forest tercet samples through it")
    untyped: Any = model
    vocabulary = len(untyped.get_input_embeddings().weight)
    draw = torch.Generator().manual_seed(0)
    short, long = (torch.randint(vocabulary, (n,), generator=draw).tolist() for n in TRIED_TOKENS)
    try:
        trunk, linear = getattr(model, model.base_model_prefix), untyped.get_output_embeddings()
        both = padded_hidden(trunk, [short, long], model.device)
        alone = padded_hidden(trunk, [short], model.device)[0]
        begun = padded_hidden(trunk, [long[: len(short)]], model.device)[0]
        tokens = torch.tensor([short], device=model.device)
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
        own, plain = OwnHead(model)(alone), linear(alone)
    # Code that came with a model may raise whatever it likes.
    except Exception as error:
        raise ModelError(f"{name} takes no packed forest, and cannot compute padded rows either: {error}") from error
    if not _alike(both[0, : len(short)], alone):
        raise ModelError(f"{name} gives a row other numbers beside a longer one, so it cannot be used here")
    if not _alike(both[1, : len(short)], begun):
        raise ModelError(f"{name} lets a token see later ones (an encoder?); a causal language model is wanted")
    if not _alike(own, logits):
        raise ModelError(f"{name} has logits that do not follow from its last hidden states, so it cannot be used here")
    return _alike(plain, logits)


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = TOLERANCE.get(b.dtype, 1e-6)
    off = (a.float() - b.float()).abs().amax(-1) / b.float().abs().amax()
    # Rounding to half precision can send a single token to other experts.
    return float(off.max() if b.dtype in (torch.float32, torch.float64) else off.median()) < tolerance
