"""The one place where a model meets a loss: batch -> what the model says -> loss -> backward.

Normalisation happens here and only here, by the weight of the whole batch over all its micro-batches, so that the
gradient does not depend on how the batch is split.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tercet.engine.collate import IntArray
from tercet.engine.outputs import Body, outputs
from tercet.errors import EngineError, TrainingError
from tercet.losses import LOSSES, Loss
from tercet.types import Batch, Datum, StepResult, TokenOutputs


@dataclass(frozen=True)
class _Piece:
    """Some sequences of a batch, whole pairs of them."""

    places: list[int]
    """Where they stand in the batch."""
    data: list[Datum]
    wanted: list[IntArray]
    pairs: list[int]
    """Which of the batch's pairs."""


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
        EngineError: The loss or a setting of it is unknown; the batch lacks a stream that the loss needs; the model
            lacks the head that it needs; a sequence is empty, longer than the model takes, or has a token that the
            model does not know.
        TrainingError: The loss is not finite.
    """
    _check_tokens(body, batch)
    loss = _checked_loss(loss_name, body, batch, settings)
    pieces = [
        each for each in _pieces(body, batch, max_tokens) if loss.per != "token" or sum(map(len, each.wanted)) > 0
    ]
    step = _Step(loss_name, body, batch, settings, temperature)
    if loss.separable or len(pieces) <= 1:
        for piece in pieces:
            said = step.said(piece)
            _learn(step.objective(step.fed(piece, said), piece), piece)
            step.note(piece, said)
    else:
        # The loss over all rows gives the gradient with respect to what the model says of each; the second pass
        # carries it into the model, piece by piece.
        with torch.no_grad():
            parts = [step.fed(piece, step.said(piece)) for piece in pieces]
        leaves = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in loss.inputs}
        places = [place for piece in pieces for place in piece.places]
        order = torch.tensor(np.argsort(places), device=body.device)
        rows = {name: leaf[order] for name, leaf in leaves.items()}
        step.objective(rows, _whole(batch)).backward()  # type: ignore[no-untyped-call]
        sizes = [len(piece.places) for piece in pieces]
        gradients = {
            name: torch.split(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, sizes)
            for name, leaf in leaves.items()
        }
        for i, piece in enumerate(pieces):
            said = step.said(piece)
            fed = step.fed(piece, said)
            _learn(torch.stack([(fed[name] * gradients[name][i]).sum() for name in loss.inputs]).sum(), piece)
            step.note(piece, said)
    return step.result()


def _learn(objective: Tensor, piece: _Piece) -> None:
    # What has no token with a weight may hang on no parameter; its gradient is nothing.
    if objective.requires_grad or any(map(len, piece.wanted)):
        objective.backward()  # type: ignore[no-untyped-call]


class _Step:
    """One batch under one loss, and what has been found so far."""

    def __init__(
        self, name: str, body: Body | None, batch: Batch, settings: Mapping[str, float], temperature: float = 1.0
    ) -> None:
        self.name, self.body, self.batch, self.settings, self.temperature = name, body, batch, settings, temperature
        self.device = torch.device("cpu") if body is None else body.device
        self.loss = loss = LOSSES[name]
        self.reads_logprobs = bool({"logprobs", "entropies"} & set(loss.inputs))
        self.normaliser = _normaliser(loss, batch)
        self.total = 0.0
        self.sums: dict[str, tuple[float, float]] = {}
        self.logprobs = [[0.0] * len(datum.tokens) for datum in batch.data] if self.reads_logprobs else []

    def said(self, piece: _Piece) -> dict[str, Tensor]:
        """What the model says of a piece, flat."""
        assert self.body is not None
        return outputs(
            self.body,
            [datum.tokens for datum in piece.data],
            piece.wanted,
            self.loss.inputs,
            temperature=self.temperature,
            entropy_gradient="entropies" in self.loss.inputs,
        )

    def fed(self, piece: _Piece, said: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss's inputs in its shape: (B, T) per token, (N,) per row or pair."""
        if self.loss.per == "token":
            return {name: _padded(said[name], piece.wanted) for name in self.loss.inputs}
        found: dict[str, Tensor] = {}
        for name in self.loss.inputs:
            if name == "scores":
                found[name] = said[name]
            elif name == "lengths":
                lengths = [datum.weight for datum in piece.data]
                found[name] = torch.tensor(lengths, dtype=torch.float32, device=self.device)
            else:
                padded = _padded(said[name], piece.wanted)
                weights = _padded_stream([datum.weights for datum in piece.data], piece.wanted, padded.device)
                found[name] = (padded * weights.to(padded.dtype)).sum(-1)
        return found

    def objective(self, fed: Mapping[str, Tensor], piece: _Piece) -> Tensor:
        """The part of the normalised loss that a piece's rows and pairs contribute; noted with its metrics."""
        loss, batch, device = self.loss, self.batch, self.device
        data, wanted, pairs = piece.data, piece.wanted, piece.pairs
        inputs = [fed[name] for name in loss.inputs]
        streams = {
            name: _padded_stream([datum.streams[name] for datum in data], wanted, device) for name in loss.streams
        }
        weights = _padded_stream([datum.weights for datum in data], wanted, device)
        if loss.per != "token":
            streams = {name: (stream * weights).sum(-1) for name, stream in streams.items()}
        extra: dict[str, Tensor] = {}
        if loss.per == "row":
            weights = torch.tensor([_row_weight(loss, datum) for datum in data], device=device)
        elif loss.per == "pair":
            row = {place: i for i, place in enumerate(piece.places)}
            chosen, rejected = (
                torch.tensor([row[batch.pairs[i][side]] for i in pairs], dtype=torch.long, device=device)
                for side in (0, 1)
            )
            extra = {"chosen": chosen, "rejected": rejected}
            for name in loss.pair_streams:
                extra[name] = torch.tensor([batch.pair_streams[name][i] for i in pairs], device=device)
            weights = torch.tensor([_pair_weight(batch, i) for i in pairs], device=device)
        values, metrics = loss.function(*inputs, **streams, **extra, **self.settings)
        objective = torch.where(weights != 0, values * weights, torch.zeros_like(values)).sum() / self.normaliser
        amount = float(objective.detach())
        if not np.isfinite(amount):
            spans = ", ".join(f"{name} {_span(fed[name])}" for name in loss.inputs if fed[name].numel())
            raise TrainingError(f"the loss {self.name} is {amount}; what it reads spans: {spans}")
        self.total += amount
        weight = float(weights.sum())
        for name, each in metrics.items():
            self._add(name, float((each.detach() * weights).sum()), weight)
        return objective

    def note(self, piece: _Piece, said: Mapping[str, Tensor]) -> None:
        """Keep the log-probs and the mean entropy of a piece."""
        if not self.reads_logprobs:
            return
        _scatter(self.logprobs, piece, said["logprobs"])
        weights = np.concatenate([np.asarray(d.weights)[t] for d, t in zip(piece.data, piece.wanted, strict=True)])
        entropies = said["entropies"].detach().double().cpu().numpy()
        self._add("entropy", float((entropies * weights).sum()), float(weights.sum()))

    def _add(self, name: str, value: float, weight: float) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (before[0] + value, before[1] + weight)

    def result(self) -> StepResult:
        """What the whole batch gave."""
        means = {name: value / weight if weight else value for name, (value, weight) in self.sums.items()}
        return StepResult(self.total, means, self.logprobs)


def from_logprobs(batch: Batch, loss_name: str, logprobs: Tensor, **settings: float) -> tuple[Tensor, StepResult]:
    """The normalised loss of log-probs that a model elsewhere has given.

    Args:
        batch: What is learned.
        loss_name: A key of `LOSSES`, which reads log-probs only.
        logprobs: One for every weight that is not 0, in their order; the loss can be taken back to them.
        settings: Passed to the loss.

    Raises:
        EngineError: As for `forward_backward`; the loss reads more than log-probs.
        TrainingError: The loss is not finite.
    """
    loss = _checked_loss(loss_name, None, batch, settings)
    if not set(loss.inputs) <= {"logprobs", "lengths"}:
        raise EngineError(f"the loss {loss_name} reads {', '.join(loss.inputs)}, and only log-probs are known here")
    whole = _whole(batch)
    step = _Step(loss_name, None, batch, settings)
    objective = step.objective(step.fed(whole, {"logprobs": logprobs}), whole)
    _scatter(step.logprobs, whole, logprobs)
    return objective, step.result()


def forward(
    body: Body, batch: Batch, *, max_tokens: int, temperature: float = 1.0, values_only: bool = False
) -> TokenOutputs:
    """Log-probs, entropies and (with a head) values where weights are not zero, without gradient.

    Raises:
        EngineError: A sequence is empty, longer than the model takes, or has a token that the model does not know;
            values are asked for and there is no head.
    """
    _check_tokens(body, batch)
    if values_only and body.value_head is None:
        raise EngineError("values were asked for, but these weights have no head; make the trainer with one")
    kinds = ["values"] if body.value_head is not None else []
    kinds += [] if values_only else ["logprobs", "entropies"]
    found = {kind: [[0.0] * len(datum.tokens) for datum in batch.data] for kind in kinds}
    with torch.inference_mode():
        for piece in _pieces(body, batch, max_tokens):
            if sum(map(len, piece.wanted)):
                said = outputs(
                    body, [datum.tokens for datum in piece.data], piece.wanted, kinds, temperature=temperature
                )
                for kind in kinds:
                    _scatter(found[kind], piece, said[kind])
    return TokenOutputs(found.get("logprobs", []), found.get("entropies", []), found.get("values", []))


def scores(body: Body, sequences: Sequence[Sequence[int]], *, max_tokens: int) -> list[float]:
    """The head at the last token of every sequence, without gradient.

    Raises:
        EngineError: As for `forward`; there is no head.
    """
    if body.value_head is None:
        raise EngineError("scores were asked for, but these weights have no head; a reward model has one")
    batch = Batch([Datum(tokens, [0.0] * len(tokens)) for tokens in sequences])
    _check_tokens(body, batch)
    found = [0.0] * len(sequences)
    with torch.inference_mode():
        for piece in _pieces(body, batch, max_tokens):
            said = outputs(body, [datum.tokens for datum in piece.data], piece.wanted, ["scores"])
            for place, score in zip(piece.places, said["scores"].tolist(), strict=True):
                found[place] = score
    return found


def _pieces(body: Body, batch: Batch, max_tokens: int) -> Iterator[_Piece]:
    home: dict[int, list[int]] = {}
    for i, (chosen, _) in enumerate(batch.pairs):
        home.setdefault(chosen, []).append(i)
    for places in body.micro_batches(batch, max_tokens):
        yield _piece(batch, places, [pair for i in places for pair in home.get(i, [])])


def _whole(batch: Batch) -> _Piece:
    return _piece(batch, list(range(len(batch.data))), list(range(len(batch.pairs))))


def _piece(batch: Batch, places: list[int], pairs: list[int]) -> _Piece:
    data = [batch.data[i] for i in places]
    return _Piece(places, data, [np.flatnonzero(np.asarray(datum.weights)) for datum in data], pairs)


def _check_tokens(body: Body, batch: Batch) -> None:
    vocabulary = body.head.out_features
    for i, tokens in enumerate(datum.tokens for datum in batch.data):
        if not 0 < len(tokens) <= body.context_tokens:
            raise EngineError(f"datum {i} has {len(tokens)} tokens; the model takes from 1 to {body.context_tokens}")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < vocabulary)
            raise EngineError(f"datum {i} has the token {wrong}; the model knows 0 to {vocabulary - 1}")


def _checked_loss(name: str, body: Body | None, batch: Batch, settings: Mapping[str, float]) -> Loss:
    if name not in LOSSES:
        raise EngineError(f"there is no loss {name!r}; there are {', '.join(sorted(LOSSES))}")
    loss = LOSSES[name]
    given = {*loss.inputs, *loss.streams, *loss.pair_streams, "chosen", "rejected"}
    accepted = inspect.signature(loss.function).parameters.keys() - given
    if not settings.keys() <= accepted:
        unknown, known = min(settings.keys() - accepted), ", ".join(sorted(accepted)) or "none"
        raise EngineError(f"the loss {name} has no setting {unknown!r}; it has {known}")
    for i, datum in enumerate(batch.data):
        for stream in loss.streams:
            if stream not in datum.streams:
                raise EngineError(f"the loss {name} needs the stream {stream}, which datum {i} lacks")
    if loss.per == "pair" and not batch.pairs:
        raise EngineError(f"the loss {name} compares pairs, and the batch has none")
    for stream in loss.pair_streams:
        if stream not in batch.pair_streams:
            raise EngineError(f"the loss {name} needs the pair stream {stream}, which the batch lacks")
    if {"values", "scores"} & set(loss.inputs) and (body is None or body.value_head is None):
        raise EngineError(f"the loss {name} needs a head, which these weights lack; make the trainer with head=Head()")
    return loss


def _row_weight(loss: Loss, datum: Datum) -> float:
    return float("scores" in loss.inputs or any(datum.weights))


def _pair_weight(batch: Batch, pair: int) -> float:
    return 1.0 if batch.pair_weights is None else batch.pair_weights[pair]


def _normaliser(loss: Loss, batch: Batch) -> float:
    # The weight of the whole batch, not of a micro-batch: a mean of means would weigh a short row's token more.
    amount = {
        "sum": 1.0,
        "token_mean": sum(datum.weight for datum in batch.data),
        "row_mean": sum(_row_weight(loss, datum) for datum in batch.data),
        "pair_mean": sum(_pair_weight(batch, i) for i in range(len(batch.pairs))),
    }[loss.reduction]
    return amount or 1.0


def _padded(flat: Tensor, wanted: Sequence[IntArray]) -> Tensor:
    """(N,) -> (B, T): each row's wanted tokens from the left; what is beyond them is 0 and has no weight."""
    return nn.utils.rnn.pad_sequence(list(torch.split(flat, [len(t) for t in wanted])), batch_first=True)


def _padded_stream(values: Sequence[Sequence[float]], wanted: Sequence[IntArray], device: torch.device) -> Tensor:
    rows = [torch.from_numpy(np.asarray(v, dtype=np.float32)[t]) for v, t in zip(values, wanted, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def _scatter(into: list[list[float]], piece: _Piece, flat: Tensor) -> None:
    """Write the flat values back to where they belong: as long as the datum, 0.0 where there is no weight."""
    values = flat.detach().float().cpu().tolist()
    at = 0
    for i, t in zip(piece.places, piece.wanted, strict=True):
        for place in t.tolist():
            into[i][place] = values[at]
            at += 1


def _span(values: Tensor) -> str:
    return f"{float(values.detach().min()):.4g} to {float(values.detach().max()):.4g}"
