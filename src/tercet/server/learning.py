"""A batch in the protocol's terms, learned by an engine in its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tercet.engine.base import Trainer
from tercet.errors import UsageError
from tercet.losses import LOSSES
from tercet.server.wire import LearnRequest, Row, learn_response
from tercet.types import Batch, Datum, StepResult


@dataclass(frozen=True)
class Spoken:
    """A loss of the protocol in terms of ours."""

    name: str
    """In `LOSSES`; it adds up over tokens."""
    streams: Mapping[str, str]
    """The protocol's input -> our stream."""
    settings: Mapping[str, tuple[str, Callable[[float], float]]]
    """The protocol's setting -> ours, and its value."""


_SAMPLED = {"logprobs": "sampling_logprobs", "advantages": "advantages"}
# The protocol bounds the ratio itself, ours says how far it may be from 1.
_BOUNDS: dict[str, tuple[str, Callable[[float], float]]] = {
    "clip_low_threshold": ("clip_low", lambda bound: 1 - bound),
    "clip_high_threshold": ("clip_high", lambda bound: bound - 1),
}
SPOKEN = {
    "cross_entropy": Spoken("cross_entropy_sum", {}, {}),
    "importance_sampling": Spoken("importance_sampling_sum", _SAMPLED, {}),
    "ppo": Spoken("ppo_sum", _SAMPLED, _BOUNDS),
    "cispo": Spoken("cispo_sum", _SAMPLED, {
        "clip_low_threshold": ("ratio_min", float), "clip_high_threshold": ("ratio_max", float),
    }),
    "dro": Spoken("dro_sum", _SAMPLED, {"beta": ("beta", float)}),
    "gspo": Spoken("gspo_sum", {**_SAMPLED, "sequence_ratio_mask": "sequence_ratio_mask"}, _BOUNDS),
}  # fmt: skip


def learn(trainer: Trainer, request: LearnRequest, *, most_tokens: int) -> bytes:
    """Add a request's gradient, or (`forward_only`) only look; what it gave, as the SDK reads it.

    Args:
        trainer: Learns.
        request: As it was sent.
        most_tokens: How many tokens it may come to, a branch for every target beside the sequence among them.

    Raises:
        UsageError: The request is not one that can be learned from.
        EngineError: See `Trainer.forward_backward`.
        TrainingError: See `Trainer.forward_backward`.
    """
    if request.loss not in SPOKEN:
        raise UsageError(f"there is no loss {request.loss!r} here; there are {', '.join(SPOKEN)}")
    spoken = SPOKEN[request.loss]
    settings: dict[str, float] = {}
    for name, value in request.settings().items():
        if name not in spoken.settings:
            known = ", ".join(spoken.settings) or "none"
            raise UsageError(f"the loss {request.loss} has no setting {name!r}; it has {known}")
        ours, convert = spoken.settings[name]
        settings[ours] = convert(value)
    rows = [_Learned.of(i, row, spoken) for i, row in enumerate(request.rows())]
    _check_branches(rows, most_tokens)
    if request.loss == "gspo" and any(row.branches for row in rows):
        raise UsageError("gspo looks at whole sequences; its target_tokens must be the input's own next tokens")
    if request.forward_only:
        out = trainer.forward(Batch([datum for row in rows for datum in row.data(everywhere=True)])).result()
        found = _gathered(rows, out.logprobs)
        return learn_response(found, {"loss:sum": _loss(spoken, rows, found, settings)})
    batch = Batch([datum for row in rows for datum in row.data(everywhere=False)])
    result = trainer.forward_backward(batch, spoken.name, **settings).result()
    return learn_response(_gathered(rows, result.logprobs), _metrics(spoken, result))


@dataclass(frozen=True)
class _Learned:
    """A row, its weights and streams by target, and the places whose target is not the input's next token."""

    tokens: list[int]
    targets: list[int]
    weights: np.ndarray
    streams: dict[str, np.ndarray]
    branches: list[int]

    @classmethod
    def of(cls, i: int, row: Row, spoken: Spoken) -> _Learned:
        for name in ("target_tokens", *spoken.streams):
            if name not in row.inputs:
                raise UsageError(f"datum {i} lacks {name}, which {spoken.name.removesuffix('_sum')} needs")
        if not row.tokens:
            raise UsageError(f"datum {i} is empty")
        targets = row.inputs["target_tokens"].tolist()
        streams = {ours: np.asarray(row.inputs[theirs], np.float32) for theirs, ours in spoken.streams.items()}
        if "weights" in row.inputs:
            weights = np.asarray(row.inputs["weights"], np.float32)
        elif streams:
            # Prompts have neither a log-prob nor an advantage: nothing to learn there, and no head to pay for.
            weights = np.any([stream != 0 for stream in streams.values()], axis=0).astype(np.float32)
        else:
            weights = np.ones(len(targets), np.float32)
        branches = [
            t for t, (after, wanted) in enumerate(zip(row.tokens[1:], targets, strict=False)) if after != wanted
        ]
        return cls(row.tokens, targets, weights, streams, branches)

    def data(self, *, everywhere: bool) -> list[Datum]:
        """The sequence itself, and one that ends early for every target beside it; prefixes are computed once."""
        weights = np.ones_like(self.weights) if everywhere else self.weights
        own = weights.copy()
        own[self.branches] = 0
        whole = Datum(
            [*self.tokens, self.targets[-1]],
            [0.0, *own.tolist()],
            {name: [0.0, *stream.tolist()] for name, stream in self.streams.items()},
        )
        return [whole, *(self._branch(t, float(weights[t])) for t in self.branches)]

    def _branch(self, t: int, weight: float) -> Datum:
        before = [0.0] * (t + 1)
        streams = {name: [*before, float(stream[t])] for name, stream in self.streams.items()}
        return Datum([*self.tokens[: t + 1], self.targets[t]], [*before, weight], streams)


def _check_branches(rows: Sequence[_Learned], most_tokens: int) -> None:
    # Before any branch is built: t targets beside one sequence are of the order of t * t tokens.
    tokens = sum(len(row.tokens) + sum(t + 1 for t in row.branches) for row in rows)
    if tokens > most_tokens:
        beside, targets = sum(len(row.branches) for row in rows), sum(len(row.targets) for row in rows)
        raise UsageError(
            f"{beside} of the request's {targets} targets are not the input's next token. Each is learned on a "
            f"sequence of its own, which comes to {tokens} tokens, and {most_tokens} are allowed. "
            "target_tokens must be the inputs shifted by one: tokens[:-1] as model_input, tokens[1:] as target_tokens"
        )


def _gathered(rows: Sequence[_Learned], logprobs: Sequence[Sequence[float]]) -> list[list[float]]:
    """One log-prob a target, from those of the sequences and their branches."""
    found, at = [], 0
    for row in rows:
        own = list(logprobs[at][1:])
        for k, t in enumerate(row.branches, start=at + 1):
            own[t] = logprobs[k][-1]
        found.append(own)
        at += 1 + len(row.branches)
    return found


def _loss(
    spoken: Spoken, rows: Sequence[_Learned], logprobs: Sequence[Sequence[float]], settings: Mapping[str, float]
) -> float:
    import torch

    total = 0.0
    for row, found in zip(rows, logprobs, strict=True):
        streams = {name: torch.from_numpy(stream.copy())[None] for name, stream in row.streams.items()}
        values, _ = LOSSES[spoken.name].function(torch.tensor([found]), **streams, **settings)
        total += float((values[0] * torch.from_numpy(row.weights.copy())).sum())
    return total


def _metrics(spoken: Spoken, result: StepResult) -> dict[str, float]:
    # The SDK folds the metrics of a batch's pieces, and wants to be told how: "name:reduction". The weights of
    # cross_entropy may be a client's own gradient, of either sign, under which a mean says nothing.
    means = {f"{name}:mean": value for name, value in result.metrics.items()} if spoken.streams else {}
    return {"loss:sum": result.loss, **means}
