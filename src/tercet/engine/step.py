"""The one place where a model meets a loss: batch -> log-probs -> loss -> backward.

Normalisation happens here and only here, by the weight of the whole batch over all its micro-batches, so that the
gradient does not depend on how the batch is split.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tercet.engine.collate import Forest, IntArray, forest, micro_batches
from tercet.errors import EngineError, TrainingError
from tercet.losses import LOSSES, Loss
from tercet.models.logprobs import token_logprobs
from tercet.models.tree_attention import ForestLayout, Layout, span
from tercet.types import Batch, Datum, StepResult, TokenOutputs

# Attention is computed in spans of about this many tokens: fewer calls than one a branch, little masked-out work.
SPAN_TOKENS = 256


@dataclass(frozen=True)
class Body:
    """The two parts of a causal language model: tokens -> hidden states, hidden states -> logits."""

    trunk: nn.Module
    head: nn.Linear
    device: torch.device
    context_tokens: int

    def hidden(self, tokens: IntArray, positions: IntArray, layout: Layout) -> Tensor:
        """Last hidden states (T, D) of one packed row (T,)."""
        out = self.trunk(
            input_ids=torch.from_numpy(tokens)[None].to(self.device),
            position_ids=torch.from_numpy(positions)[None].to(self.device),
            use_cache=False,
            layout=layout,
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def forest_layout(packed: Forest, device: torch.device) -> ForestLayout:
    """How a packed forest attends."""
    ends = torch.from_numpy(packed.subtree_end)
    return ForestLayout(
        tuple(
            span(unit.start, unit.end, torch.from_numpy(unit.ancestors), ends).to(device)
            for unit in packed.units(SPAN_TOKENS)
        )
    )


def predicted(
    packed: Forest, sequences: Sequence[Sequence[int]], wanted: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Where in the row the wanted tokens are predicted from, and which tokens they are.

    `wanted[i]` holds the positions t >= 1 of sequence i; the token at t is predicted from the hidden state at t - 1.
    """
    sources = [path[t - 1] for path, t in zip(packed.paths, wanted, strict=True)]
    targets = [np.asarray(tokens, dtype=np.int64)[t] for tokens, t in zip(sequences, wanted, strict=True)]
    return torch.from_numpy(np.concatenate(sources)), torch.from_numpy(np.concatenate(targets))


def sequence_logprobs(
    body: Body, sequences: Sequence[Sequence[int]], wanted: Sequence[np.ndarray], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the wanted tokens of all sequences, one after another (N,)."""
    # Nothing is predicted from a sequence's last token, so it is not computed: both labels of a pair become one path.
    packed = forest([tokens[:-1] if len(tokens) > 1 else tokens for tokens in sequences])
    sources, targets = predicted(packed, sequences, wanted)
    hidden = body.hidden(packed.tokens, packed.positions, forest_layout(packed, body.device))
    return token_logprobs(hidden[sources.to(body.device)], targets.to(body.device), body.head, temperature)


def forward_backward(
    body: Body, batch: Batch, loss_name: str, *, max_tokens: int, temperature: float = 1.0, **settings: float
) -> StepResult:
    """Add the gradient of the batch's normalised loss to the trainable parameters.

    Args:
        body: The model.
        batch: What to learn.
        loss_name: A key of `LOSSES`.
        max_tokens: Token budget of a micro-batch.
        temperature: Of the policy's distribution.
        settings: Passed to the loss.

    Raises:
        EngineError: The loss or a setting of it is unknown; the batch lacks a stream that the loss needs; a sequence is
            empty, longer than the model takes, or has a token that the model does not know.
        TrainingError: The loss is not finite.
    """
    _check_tokens(body, batch)
    loss = _checked_loss(loss_name, batch, settings)
    normaliser = _normaliser(loss, batch)
    total = 0.0
    sums: dict[str, float] = {}
    weight = sum(datum.weight for datum in batch.data)
    logprobs: list[list[float]] = [[] for _ in batch.data]
    for piece in micro_batches(batch, max_tokens):
        data = [batch.data[i] for i in piece]
        wanted = [np.flatnonzero(np.asarray(datum.weights)) for datum in data]
        if sum(map(len, wanted)) == 0:
            _scatter(logprobs, piece, data, wanted, [])
            continue
        flat, entropy = sequence_logprobs(body, [datum.tokens for datum in data], wanted, temperature)
        values, metrics = loss.function(_padded(flat, wanted), **_streams(loss, data, wanted, flat.device), **settings)
        weights = _padded_stream([datum.weights for datum in data], wanted, flat.device)
        objective = torch.where(weights != 0, values * weights, torch.zeros_like(values)).sum() / normaliser
        amount = float(objective.detach())
        if not np.isfinite(amount):
            raise TrainingError(f"the loss {loss_name} is {amount}; the batch's log-probs span {_span(flat)}")
        objective.backward()  # type: ignore[no-untyped-call]
        total += amount
        metrics = {**metrics, "entropy": _padded(entropy, wanted)}
        for name, each in metrics.items():
            sums[name] = sums.get(name, 0.0) + float((each * weights).sum())
        _scatter(logprobs, piece, data, wanted, flat.detach().float().cpu().tolist())
    means = {name: value / weight for name, value in sums.items()} if weight else sums
    return StepResult(total, means, logprobs)


def forward(body: Body, batch: Batch, *, max_tokens: int, temperature: float = 1.0) -> TokenOutputs:
    """Log-probs and entropies where weights are not zero, without gradient.

    Raises:
        EngineError: A sequence is empty, longer than the model takes, or has a token that the model does not know.
    """
    _check_tokens(body, batch)
    logprobs: list[list[float]] = [[] for _ in batch.data]
    entropies: list[list[float]] = [[] for _ in batch.data]
    with torch.inference_mode():
        for piece in micro_batches(batch, max_tokens):
            data = [batch.data[i] for i in piece]
            wanted = [np.flatnonzero(np.asarray(datum.weights)) for datum in data]
            if sum(map(len, wanted)) == 0:
                flat = entropy = torch.zeros(0)
            else:
                flat, entropy = sequence_logprobs(body, [datum.tokens for datum in data], wanted, temperature)
            _scatter(logprobs, piece, data, wanted, flat.float().cpu().tolist())
            _scatter(entropies, piece, data, wanted, entropy.float().cpu().tolist())
    return TokenOutputs(logprobs, entropies)


def _check_tokens(body: Body, batch: Batch) -> None:
    vocabulary = body.head.out_features
    for i, tokens in enumerate(datum.tokens for datum in batch.data):
        if not 0 < len(tokens) <= body.context_tokens:
            raise EngineError(f"datum {i} has {len(tokens)} tokens; the model takes from 1 to {body.context_tokens}")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < vocabulary)
            raise EngineError(f"datum {i} has the token {wrong}; the model knows 0 to {vocabulary - 1}")


def _checked_loss(name: str, batch: Batch, settings: Mapping[str, float]) -> Loss:
    if name not in LOSSES:
        raise EngineError(f"there is no loss {name!r}; there are {', '.join(sorted(LOSSES))}")
    loss = LOSSES[name]
    accepted = inspect.signature(loss.function).parameters.keys() - {"logprobs", *loss.streams}
    if not settings.keys() <= accepted:
        unknown, known = min(settings.keys() - accepted), ", ".join(sorted(accepted)) or "none"
        raise EngineError(f"the loss {name} has no setting {unknown!r}; it has {known}")
    for i, datum in enumerate(batch.data):
        for stream in loss.streams:
            if stream not in datum.streams:
                raise EngineError(f"the loss {name} needs the stream {stream}, which datum {i} lacks")
    return loss


def _normaliser(loss: Loss, batch: Batch) -> float:
    # The weight of the whole batch, not of a micro-batch: a mean of means would weigh a short row's token more.
    amount = {
        "sum": 1.0,
        "token_mean": sum(datum.weight for datum in batch.data),
        "row_mean": float(sum(any(datum.weights) for datum in batch.data)),
    }[loss.reduction]
    return amount or 1.0


def _padded(flat: Tensor, wanted: Sequence[np.ndarray]) -> Tensor:
    """(N,) -> (B, T): each row's wanted tokens from the left; what is beyond them is 0 and has no weight."""
    return nn.utils.rnn.pad_sequence(list(torch.split(flat, [len(t) for t in wanted])), batch_first=True)


def _padded_stream(values: Sequence[Sequence[float]], wanted: Sequence[np.ndarray], device: torch.device) -> Tensor:
    rows = [torch.from_numpy(np.asarray(v, dtype=np.float32)[t]) for v, t in zip(values, wanted, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def _streams(
    loss: Loss, data: Sequence[Datum], wanted: Sequence[np.ndarray], device: torch.device
) -> dict[str, Tensor]:
    return {name: _padded_stream([datum.streams[name] for datum in data], wanted, device) for name in loss.streams}


def _scatter(
    into: list[list[float]], piece: list[int], data: Sequence[Datum], wanted: Sequence[np.ndarray], flat: list[float]
) -> None:
    """Write the flat values back to where they belong: as long as the datum, 0.0 where there is no weight."""
    at = 0
    for i, datum, t in zip(piece, data, wanted, strict=True):
        row = [0.0] * len(datum.tokens)
        for place in t.tolist():
            row[place] = flat[at]
            at += 1
        into[i] = row


def _span(flat: Tensor) -> str:
    return f"{float(flat.detach().min()):.4g} to {float(flat.detach().max()):.4g}"
