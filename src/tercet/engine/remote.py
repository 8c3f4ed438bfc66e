"""An engine somewhere else: the Tinker protocol from the client's side, through the `tinker` SDK.

It drives any service that speaks the protocol, the hosted one or `tercet serve`. Weights stay there; what `save` writes
is a small file that names them.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tercet.engine.base import Sampler
from tercet.engine.bodies import Language
from tercet.engine.step import from_logprobs
from tercet.engine.told import told
from tercet.errors import CheckpointError, EngineError, UsageError
from tercet.losses import LOSSES
from tercet.models.export import SERVICE_FILE
from tercet.types import (
    AdamParams,
    Batch,
    Completion,
    Datum,
    Head,
    LoraConfig,
    OptimResult,
    SamplingParams,
    StepResult,
    StopReason,
    TokenOutputs,
    TopLogprobs,
    Weights,
)  # fmt: skip

Result = TypeVar("Result")
ALPHA = 32.0
# What the service learns by itself: our setting -> its own, and how the value is said there. These losses are
# proportional to the advantage, so that a weight and a mean can be sent as a larger or smaller advantage.
LEARNED: dict[str, dict[str, tuple[str, Callable[[float], float]]]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {
        "clip_low": ("clip_low_threshold", lambda part: 1 - part),
        "clip_high": ("clip_high_threshold", lambda part: 1 + part),
    },
    "cispo": {"ratio_min": ("clip_low_threshold", float), "ratio_max": ("clip_high_threshold", float)},
}


@dataclass(frozen=True)
class Note:
    """What `save` writes: where the service keeps the weights."""

    state: str
    sampler: str
    fingerprint: str

    def write(self, directory: Path) -> None:
        """Into the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SERVICE_FILE).write_text(json.dumps(vars(self)))

    @classmethod
    def read(cls, weights: Weights) -> Note:
        """From the directory.

        Raises:
            CheckpointError: It names no weights of a service.
        """
        try:
            return cls(**json.loads((weights.path / SERVICE_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{weights.path} names no weights of a Tinker service: {error}") from error


class RemoteEngine:
    """See `tercet.engine.base.Engine`; it trains adapters of alpha 32 and has no heads."""

    def __init__(self, client: Any, model: str, language: Language, *, context_tokens: int) -> None:
        """Take over a connection.

        Args:
            client: A `tinker.ServiceClient`.
            model: The base model, by the service's name.
            language: Of that model.
            context_tokens: The longest sequence it takes.
        """
        self.client, self.model, self.language, self.context_tokens = client, model, language, context_tokens
        self.waiting = ThreadPoolExecutor(4, "remote")

    @classmethod
    def connect(cls, model: str, language: Language, *, context_tokens: int) -> RemoteEngine:
        """Begin a session with the service that TINKER_BASE_URL and TINKER_API_KEY lead to; it ends with the process.

        Args:
            model: See above.
            language: See above.
            context_tokens: For a service that does not tell how much the model reads.

        Raises:
            UsageError: The SDK or a key is missing.
            EngineError: The service cannot be reached, or has no such model.
        """
        if importlib.util.find_spec("tinker") is None:
            raise UsageError("engine tinker needs the tinker SDK: pip install 'tercet[tinker]'")
        if not os.environ.get("TINKER_API_KEY"):
            raise UsageError(
                "engine tinker needs TINKER_API_KEY, and TINKER_BASE_URL for another service than the hosted one; "
                "tercet serve says both when it starts"
            )
        import tinker

        with told():
            offered = {
                each.model_name: each
                for each in tinker.RestClient().get_server_capabilities().result().supported_models
            }
            if model not in offered:
                raise EngineError(f"the service has no model {model!r}; it has {', '.join(sorted(map(str, offered)))}")
            client = tinker.ServiceClient()
        engine = cls(client, model, language, context_tokens=int(offered[model].max_context_length or context_tokens))
        atexit.register(engine.close)
        return engine

    def close(self) -> None:
        """Tell the service that nothing more comes, so that it lets go of what was trained in this session."""
        with suppress(Exception):  # a service that is gone has let go
            self.client.close("success").result(timeout=5)

    def has_head(self, weights: Weights) -> bool:
        """Whether saved weights score; never."""
        return False

    def trainer(
        self,
        *,
        init: Weights | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
        head: Head | None = None,
    ) -> RemoteTrainer:
        """See `Engine`.

        Raises:
            EngineError: A head, a whole model, or an adapter that the service has not is asked for.
        """
        if head is not None:
            raise EngineError(
                "a Tinker service has no heads; a reward model or a critic is trained by the local engine"
            )
        if init is not None:
            note = Note.read(init)
            return RemoteTrainer(self, lambda: self.client.create_training_client_from_state(note.state), note)
        if lora is None or lora.alpha != ALPHA or lora.targets != ("all-linear",):
            raise EngineError(f"a Tinker service trains adapters of alpha {ALPHA:g} on all layers; got {lora}")
        rank = lora.rank
        return RemoteTrainer(
            self, lambda: self.client.create_lora_training_client(base_model=self.model, rank=rank, seed=seed), None
        )

    def sampler(self, weights: Weights | None = None) -> RemoteSampler:
        """See `Engine`."""
        note = None if weights is None else Note.read(weights)
        with told():
            if note is None:
                return RemoteSampler(self, self.client.create_sampling_client(base_model=self.model).result(), "base")
            made = self.client.create_sampling_client(model_path=note.sampler).result()
        return RemoteSampler(self, made, note.fingerprint)

    def scorer(self, weights: Weights) -> Any:
        """See `Engine`; there is none."""
        raise EngineError("a Tinker service has no heads to score with")

    def later(self, work: Callable[[], Result]) -> Future[Result]:
        """Wait for the service's answers in the background."""

        def waited() -> Result:
            with told():
                return work()

        return self.waiting.submit(waited)


class RemoteSampler:
    """See `tercet.engine.base.Sampler`."""

    def __init__(self, engine: RemoteEngine, client: Any, fingerprint: str) -> None:
        self.engine, self.client, self._fingerprint = engine, client, fingerprint

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Future[list[list[Completion]]]:
        """See `Sampler`. The service draws as it does: the same seed gives other samples than the local engine's."""
        if params.min_p:
            raise EngineError("the Tinker protocol has no min_p; top_p is near it")
        if len({type(stop) for stop in params.stop}) > 1:
            raise EngineError("the Tinker protocol takes stop strings or stop tokens, not both at once")
        own = [_seed(params.seed, i) for i in range(len(prompts))] if seeds is None else list(seeds)
        asked = [self._ask(prompt, n, self._params(params, seed)) for prompt, seed in zip(prompts, own, strict=True)]
        return self.engine.later(
            lambda: [[self._completion(each, params) for each in found.result().sequences] for found in asked]
        )

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """See `Sampler`."""
        if temperature not in (0.0, 1.0):
            raise EngineError(f"a Tinker service scores at temperature 1, not {temperature}; sample at 1 too")
        begins = [1] * len(sequences) if starts is None else [max(1, start) for start in starts]
        asked = [self.client.compute_logprobs(_input(tokens)) for tokens in sequences]
        return self.engine.later(
            lambda: [found.result()[start:] for found, start in zip(asked, begins, strict=True)]
        )  # fmt: skip

    def top_logprobs(
        self, sequences: Sequence[Sequence[int]], k: int, starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[TopLogprobs]]:
        """See `Sampler`."""
        if temperature not in (0.0, 1.0):
            raise EngineError(f"a Tinker service scores at temperature 1, not {temperature}; sample at 1 too")
        begins = [1] * len(sequences) if starts is None else [max(1, start) for start in starts]
        one = self._params(SamplingParams(max_tokens=1), 0)
        asked = [
            self._ask(tokens, 1, one, include_prompt_logprobs=True, topk_prompt_logprobs=k) for tokens in sequences
        ]
        return self.engine.later(
            lambda: [
                [list(place) for place in found.result().topk_prompt_logprobs[start:]]
                for found, start in zip(asked, begins, strict=True)
            ]
        )

    def divergences(
        self, other: Sampler, sequences: Sequence[Sequence[int]], starts: Sequence[int], temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """See `Sampler`; a service gives the likeliest tokens, never a whole distribution."""
        raise EngineError("a Tinker service tells no whole distributions, which an exact divergence needs")

    def fingerprint(self) -> str:
        """See `Sampler`; it is of the name of the weights, which a service never gives twice."""
        return self._fingerprint

    def _ask(self, prompt: Sequence[int], n: int, params: Any, **more: Any) -> Any:
        return self.client.sample(prompt=_input(prompt), num_samples=n, sampling_params=params, **more)

    def _params(self, params: SamplingParams, seed: int) -> Any:
        import tinker

        stop: Any = list(params.stop) if params.stop or not params.eos else None
        return tinker.types.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            seed=seed,
            stop=stop,
        )

    def _completion(self, found: Any, params: SamplingParams) -> Completion:
        tokens = tuple(int(token) for token in found.tokens)
        reason: StopReason = "length"
        if found.stop_reason == "stop":
            text = self.engine.language.decode(list(tokens)) if tokens else ""
            stopped = tokens[-1:] != () and any(
                stop == tokens[-1] or (isinstance(stop, str) and stop in text) for stop in params.stop
            )
            reason = "stop" if stopped else "eos"
        return Completion(tokens, tuple(float(each) for each in found.logprobs), reason)


class RemoteTrainer:
    """See `tercet.engine.base.Trainer`. The service makes its model when it is first needed: `load` may replace it."""

    def __init__(self, engine: RemoteEngine, make: Callable[[], Any], note: Note | None) -> None:
        """Make nothing yet.

        Args:
            engine: Knows the way.
            make: Asks for a `tinker.TrainingClient`.
            note: The weights it has; None for new ones.
        """
        self.engine, self.context_tokens = engine, engine.context_tokens
        self._make, self._note, self._steps = make, note, 0

    @cached_property
    def client(self) -> Any:
        """The service's model."""
        with told():
            return self._make().result()

    def forward_backward(self, batch: Batch, loss: str, **settings: float) -> Future[StepResult]:
        """See `Trainer`; the service learns by the losses of `LEARNED`, at temperature 1.

        Other losses are worked out here from its log-probs, whose gradient it then carries into the weights: two
        passes. They are exact too.

        Raises:
            EngineError: The loss reads more than log-probs, or another setting or temperature is asked for, or a
                stream is missing.
        """
        if settings.pop("temperature", 1.0) != 1.0:
            raise EngineError("a Tinker service learns at temperature 1; sample at 1 too")
        if loss not in LEARNED:
            return self._learn_here(batch, loss, settings)
        unknown = settings.keys() - LEARNED[loss].keys()
        if unknown:
            raise EngineError(f"the loss {loss} has no setting {min(unknown)!r} through a Tinker service")
        for i, datum in enumerate(batch.data):
            for stream in LOSSES[loss].streams:
                if stream not in datum.streams:
                    raise EngineError(f"the loss {loss} needs the stream {stream}, which datum {i} lacks")
        config = {LEARNED[loss][name][0]: LEARNED[loss][name][1](value) for name, value in settings.items()}
        total = sum(datum.weight for datum in batch.data) or 1.0
        asked = self.client.forward_backward([_sent(datum, total) for datum in batch.data], loss, config or None)
        return self.engine.later(lambda: _learned(batch, loss, settings, asked.result()))

    def _learn_here(self, batch: Batch, loss: str, settings: Mapping[str, float]) -> Future[StepResult]:
        wanted = [np.flatnonzero(np.asarray(datum.weights)) for datum in batch.data]
        if any(0 in places for places in wanted):
            raise EngineError("a first token has a weight, and nothing before it that could predict it")
        # What is wrong with the batch is said before anything is sent.
        from_logprobs(batch, loss, -torch.ones(sum(map(len, wanted))), **settings)
        found: list[StepResult] = []

        def own(data: Any, logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            flat = torch.cat([row[places - 1] for row, places in zip(logprobs, wanted, strict=True)])
            objective, result = from_logprobs(batch, loss, flat, **settings)
            found.append(result)
            # So that a row which nothing is learned from has a gradient too; the SDK insists.
            return objective + 0.0 * sum(row.sum() for row in logprobs), {}

        asked = self.client.forward_backward_custom([_sent(datum, 1.0) for datum in batch.data], own)

        def work() -> StepResult:
            asked.result()
            return found[0]

        return self.engine.later(work)

    def optim_step(self, params: AdamParams) -> Future[OptimResult]:
        """See `Trainer`; the norm is not a number where the service does not tell it."""
        import tinker

        self._steps += 1
        asked = self.client.optim_step(
            tinker.types.AdamParams(
                learning_rate=params.learning_rate, beta1=params.beta1, beta2=params.beta2, eps=params.eps,
                weight_decay=params.weight_decay, grad_clip_norm=params.max_grad_norm or 0.0,
            )
        )  # fmt: skip

        def work() -> OptimResult:
            metrics = asked.result().metrics or {}
            return OptimResult(float(metrics.get("grad_norm", math.nan)), params.learning_rate)

        return self.engine.later(work)

    def forward(self, batch: Batch, *, temperature: float = 1.0, values_only: bool = False) -> Future[TokenOutputs]:
        """See `Trainer`; the service tells no entropies, which are 0."""
        if values_only or temperature != 1.0:
            raise EngineError("a Tinker service gives log-probs at temperature 1, and no values")
        asked = self.client.forward([_sent(datum, 1.0) for datum in batch.data], "cross_entropy")

        def work() -> TokenOutputs:
            rows = _rows(batch, asked.result())
            return TokenOutputs(rows, [[0.0] * len(row) for row in rows])

        return self.engine.later(work)

    def sampler(self) -> RemoteSampler:
        """See `Trainer`."""
        with told():
            made = self.client.save_weights_and_get_sampling_client().result()
        return RemoteSampler(self.engine, made, self.fingerprint())

    def scorer(self) -> Any:
        """See `Trainer`; there is none."""
        raise EngineError("a Tinker service has no heads to score with")

    def fingerprint(self) -> str:
        """See `Trainer`; it is of the name of the weights and of the steps taken since."""
        named = self.client.model_id if self._note is None else self._note.fingerprint
        return hashlib.sha256(f"{named}+{self._steps}".encode()).hexdigest() if self._steps else str(named)

    def save(self, directory: Path) -> Future[Weights]:
        """See `Trainer`."""
        name = f"{directory.name.partition('.')[0]}-{uuid.uuid4().hex[:12]}"
        state, sampler = self.client.save_state(name), self.client.save_weights_for_sampler(name)
        fingerprint = self.fingerprint()

        def work() -> Weights:
            Note(state.result().path, sampler.result().path, fingerprint).write(directory)
            return Weights(directory)

        return self.engine.later(work)

    def load(self, weights: Weights) -> Future[None]:
        """See `Trainer`."""

        future: Future[None] = Future()
        try:
            note = Note.read(weights)
            with told():
                made = self.engine.client.create_training_client_from_state_with_optimizer(note.state).result()
            self.client, self._note, self._steps = made, note, 0
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """See `Trainer`; the protocol ends sessions, not models: the service lets go when this process ends."""


def _seed(seed: int, prompt: int) -> int:
    # The first prompt keeps its seed: `tercet serve` then draws for it what the local engine does.
    return seed if prompt == 0 else int(np.random.SeedSequence([seed, prompt]).generate_state(1)[0])


def _input(tokens: Sequence[int]) -> Any:
    import tinker

    return tinker.types.ModelInput.from_ints([int(token) for token in tokens])


def _sent(datum: Datum, total: float) -> Any:
    """A datum as the service reads it; weight and mean go into the weights or, where there are some, the advantages."""
    import tinker

    weights = np.asarray(datum.weights, np.float32)[1:]
    inputs: dict[str, np.ndarray] = {"target_tokens": np.asarray(datum.tokens, np.int64)[1:]}
    if "advantages" in datum.streams:
        inputs["advantages"] = np.asarray(datum.streams["advantages"], np.float32)[1:] * weights / total
        inputs["logprobs"] = np.where(weights != 0, np.asarray(datum.streams["sampling_logprobs"], np.float32)[1:], 0)
    else:
        inputs["weights"] = weights / total
    tensors = {
        name: tinker.types.TensorData(
            data=values.tolist(), dtype="int64" if name == "target_tokens" else "float32", shape=[len(values)]
        )
        for name, values in inputs.items()
    }
    return tinker.types.Datum(model_input=_input(datum.tokens[:-1]), loss_fn_inputs=tensors)


def _rows(batch: Batch, found: Any) -> list[list[float]]:
    return [
        [0.0, *(float(p) if w else 0.0 for p, w in zip(each["logprobs"].data, datum.weights[1:], strict=True))]
        for datum, each in zip(batch.data, found.loss_fn_outputs, strict=True)
    ]


def _learned(batch: Batch, loss: str, settings: Mapping[str, float], found: Any) -> StepResult:
    """The service's answer; the metrics of the loss are worked out here, from its log-probs."""
    rows = _rows(batch, found)
    sums: dict[str, float] = {}
    total = sum(datum.weight for datum in batch.data) or 1.0
    for datum, row in zip(batch.data, rows, strict=True):
        streams = {name: torch.tensor([list(datum.streams[name])]) for name in LOSSES[loss].streams}
        _, metrics = LOSSES[loss].function(torch.tensor([row]), **streams, **settings)
        for name, values in metrics.items():
            sums[name] = sums.get(name, 0.0) + float((values[0] * torch.tensor(datum.weights)).sum())
    return StepResult(float(found.metrics["loss:sum"]), {name: value / total for name, value in sums.items()}, rows)
