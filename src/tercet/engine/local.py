"""The engine on this machine: torch, on the CPU or one GPU.

One base model is in memory. Trainers put adapters on it through peft. Frozen weights (a sampler's) are kept as small adapter
tensors and merged, when they are used, into one work copy whose unadapted parts are the base's own tensors; so a policy,
its reference and a judge together cost one base, one work copy and a few megabytes each.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tercet.engine import step
from tercet.engine.sampler import MAX_ROWS, generate
from tercet.engine.step import Body
from tercet.errors import CheckpointError, EngineError
from tercet.models import adapters
from tercet.models.load import LoadedModel
from tercet.types import (
    AdamParams,
    Batch,
    Completion,
    Datum,
    LoraConfig,
    OptimResult,
    SamplingParams,
    StepResult,
    TokenOutputs,
    Weights,
)  # fmt: skip

Result = TypeVar("Result")
OPTIMIZER_FILE = "optimizer.safetensors"
GENERATOR_FILE = "generator.safetensors"


@dataclass(frozen=True)
class Frozen:
    """Weights that no longer change: an adapter's tensors, a whole model's, or (neither) the base's."""

    lora: LoraConfig | None = None
    tensors: Mapping[str, Tensor] | None = None

    def fingerprint(self) -> str:
        """A hash of every byte."""
        return _fingerprint(self.tensors or {})


class LocalEngine:
    """See `tercet.engine.base.Engine`."""

    def __init__(
        self, loaded: LoadedModel, *, micro_batch_tokens: int = 2048, score_tokens: int = 4096, max_rows: int = MAX_ROWS
    ) -> None:
        """Make a loaded model ready.

        Args:
            loaded: The base model; its weights are never changed.
            micro_batch_tokens: Token budget, after merging prefixes, of one pass with gradient.
            score_tokens: The same without gradient.
            max_rows: Completions decoded side by side.
        """
        self.loaded = loaded
        self.micro_batch_tokens, self.score_tokens, self.max_rows = micro_batch_tokens, score_tokens, max_rows
        self.model = loaded.model
        self.peft: PeftModel | None = None
        self._adapters = 0
        self._base = dict(self.model.named_parameters(remove_duplicate=False))
        # Made before the first adapter, so that it stays plain; it shares every tensor with the base.
        shared = {id(parameter): parameter for parameter in self._base.values()}
        self._work: PreTrainedModel = copy.deepcopy(self.model, memo=dict(shared))
        self._work_holds: Frozen | None = None
        self._buffers: dict[str, nn.Parameter] = {}

    @property
    def context_tokens(self) -> int:
        """See `Engine`."""
        return int(self.model.config.max_position_embeddings)

    def trainer(
        self, *, init: Weights | None = None, lora: LoraConfig | None = None, seed: int = 0
    ) -> LoraTrainer | FullTrainer:
        """See `Engine`. An adapter given as `init` brings its own rank and targets."""
        saved = None if init is None else self._frozen(init)
        if saved is not None and saved.lora is not None:
            lora = saved.lora
        if lora is None:
            return FullTrainer(self, None if saved is None else saved.tensors)
        name = f"adapter{self._adapters}"
        self._adapters += 1
        self.peft = adapters.add_adapter(self.peft or self.model, name, lora, base=self.loaded.name, seed=seed)
        trainer = LoraTrainer(self, name, lora)
        if saved is not None and saved.tensors is not None:
            adapters.set_adapter_tensors(self.peft, name, dict(saved.tensors))
        return trainer

    def sampler(self, weights: Weights | None = None) -> LocalSampler:
        """See `Engine`."""
        return LocalSampler(self, Frozen() if weights is None else self._frozen(weights))

    def body(self, model: nn.Module) -> Body:
        """The parts of a model of the base's architecture."""
        trunk, head = getattr(model, self.model.base_model_prefix), model.get_output_embeddings()  # type: ignore[operator]
        return Body(trunk, head, self._device())

    def work_body(self, frozen: Frozen) -> Body:
        """The work copy, holding the given weights."""
        if self._work_holds is not frozen:
            self._fill(frozen)
            self._work_holds = frozen
        return self.body(self._work)

    def detached_copy(self, tensors: Mapping[str, Tensor] | None) -> PreTrainedModel:
        """A trainable model of its own: the base's weights or the given ones."""
        own = {
            id(p): nn.Parameter((p if tensors is None else tensors[name]).detach().clone())
            for name, p in self._base.items()
        }
        memo = {id(p): own[id(p)] for p in self._base.values()}
        model: PreTrainedModel = copy.deepcopy(self._plain(), memo=dict(memo))
        return model.requires_grad_(True).eval()

    def _plain(self) -> PreTrainedModel:
        """The work copy holding the base's weights: the base without adapters."""
        self.work_body(Frozen())
        return self._work

    def _fill(self, frozen: Frozen) -> None:
        """Point the work copy's parameters at the base's, at merged buffers, or at a whole model's tensors."""
        values: dict[str, nn.Parameter] = dict(self._base)
        if frozen.tensors is not None and frozen.lora is None:
            values = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in frozen.tensors.items()}
        elif frozen.tensors is not None and frozen.lora is not None:
            for layer, (up, down, scale) in adapters.weight_updates(frozen.lora, dict(frozen.tensors)).items():
                name = f"{layer}.weight"
                base = self._base[name]
                if name not in self._buffers:
                    self._buffers[name] = nn.Parameter(torch.empty_like(base), requires_grad=False)
                with torch.no_grad():
                    self._buffers[name].copy_(adapters.merged(self._work.get_submodule(layer), base, up, down, scale))
                values[name] = self._buffers[name]
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self._work.get_submodule(owner), leaf, value)

    def _frozen(self, weights: Weights) -> Frozen:
        if adapters.is_adapter(weights.path):
            config, tensors = adapters.read_adapter(weights.path)
            return Frozen(config, {name: tensor.to(self._device()) for name, tensor in tensors.items()})
        path = weights.path / "model.safetensors"
        if not path.is_file():
            raise EngineError(f"{weights.path} holds neither an adapter nor model.safetensors")
        return Frozen(None, _whole(load_file(path), self._base))

    def _device(self) -> torch.device:
        return next(iter(self._base.values())).device


class LocalSampler:
    """See `tercet.engine.base.Sampler`."""

    def __init__(self, engine: LocalEngine, frozen: Frozen) -> None:
        self.engine, self.frozen = engine, frozen

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1
    ) -> Future[list[list[Completion]]]:
        """See `Sampler`."""
        loaded = self.engine.loaded
        return _done(
            lambda: generate(
                self.engine.work_body(self.frozen),
                prompts,
                params,
                n,
                context_tokens=self.engine.context_tokens,
                eos=_eos_tokens(loaded),
                decode=loaded.tokenizer.decode,
                max_rows=self.engine.max_rows,
            )
        )

    def logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None, temperature: float = 1.0
    ) -> Future[list[list[float]]]:
        """See `Sampler`."""
        begins = [1] * len(sequences) if starts is None else [max(1, start) for start in starts]
        data = [
            Datum(tokens, [0.0] * start + [1.0] * (len(tokens) - start))
            for tokens, start in zip(sequences, begins, strict=True)
        ]

        def work() -> list[list[float]]:
            body = self.engine.work_body(self.frozen)
            out = step.forward(body, Batch(data), max_tokens=self.engine.score_tokens, temperature=temperature)
            return [row[start:] for row, start in zip(out.logprobs, begins, strict=True)]

        return _done(work)

    def fingerprint(self) -> str:
        """See `Sampler`."""
        return self.frozen.fingerprint()


class _LocalTrainer(ABC):
    """What both kinds of trainer share: gradient, optimizer and their state."""

    def __init__(self, engine: LocalEngine, parameters: Mapping[str, nn.Parameter]) -> None:
        self.engine = engine
        self.parameters = dict(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0)

    @property
    def context_tokens(self) -> int:
        """See `Trainer`."""
        return self.engine.context_tokens

    @abstractmethod
    def body(self) -> Body:
        """The model with these weights active."""

    def forward_backward(self, batch: Batch, loss: str, **settings: float) -> Future[StepResult]:
        """See `Trainer`. The setting `temperature` is that of the policy's distribution."""
        budget = self.engine.micro_batch_tokens
        return _done(lambda: step.forward_backward(self.body(), batch, loss, max_tokens=budget, **settings))

    def forward(self, batch: Batch, *, temperature: float = 1.0) -> Future[TokenOutputs]:
        """See `Trainer`."""
        budget = self.engine.score_tokens
        return _done(lambda: step.forward(self.body(), batch, max_tokens=budget, temperature=temperature))

    def optim_step(self, params: AdamParams) -> Future[OptimResult]:
        """See `Trainer`."""
        return _done(lambda: self._optim_step(params))

    def _optim_step(self, params: AdamParams) -> OptimResult:
        for group in self.optimizer.param_groups:
            group["lr"], group["eps"] = params.learning_rate, params.eps
            group["betas"], group["weight_decay"] = (params.beta1, params.beta2), params.weight_decay
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        limit = float("inf") if params.max_grad_norm is None else params.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return OptimResult(norm, params.learning_rate)

    def _save_state(self, directory: Path) -> None:
        state = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        save_file(state, directory / OPTIMIZER_FILE)
        save_file({"cpu": torch.random.get_rng_state()}, directory / GENERATOR_FILE)

    def _load_state(self, directory: Path) -> None:
        try:
            state = load_file(directory / OPTIMIZER_FILE)
            generator = load_file(directory / GENERATOR_FILE)["cpu"]
        except (OSError, KeyError) as error:
            raise CheckpointError(f"{directory} has no optimizer state to go on from: {error}") from error
        for name, parameter in self.parameters.items():
            keys = [key for key in state if key.rpartition(".")[0] == name]
            # The step counter stays on the CPU: torch reads it there.
            self.optimizer.state[parameter] = {
                key.rpartition(".")[2]: state[key] if key.endswith(".step") else state[key].to(parameter.device)
                for key in keys
            }
            if not keys:
                del self.optimizer.state[parameter]
        torch.random.set_rng_state(generator)


class LoraTrainer(_LocalTrainer):
    """See `tercet.engine.base.Trainer`; the weights are one adapter's."""

    def __init__(self, engine: LocalEngine, name: str, lora: LoraConfig) -> None:
        assert engine.peft is not None
        super().__init__(engine, adapters.adapter_parameters(engine.peft, name))
        self.name, self.lora, self.peft = name, lora, engine.peft

    def body(self) -> Body:
        """The base with this adapter active."""
        if self.peft.active_adapters != [self.name]:
            self.peft.set_adapter(self.name)
        return self.engine.body(self.engine.model)

    def sampler(self) -> LocalSampler:
        """See `Trainer`."""
        return LocalSampler(self.engine, Frozen(self.lora, adapters.adapter_tensors(self.peft, self.name)))

    def fingerprint(self) -> str:
        """See `Trainer`."""
        return _fingerprint(adapters.adapter_tensors(self.peft, self.name))

    def save(self, directory: Path) -> Future[Weights]:
        """See `Trainer`."""

        def work() -> Weights:
            adapters.save_adapter(self.peft, self.name, directory)
            self._save_state(directory)
            return Weights(directory)

        return _done(work)

    def load(self, weights: Weights) -> Future[None]:
        """See `Trainer`."""

        def work() -> None:
            _, tensors = adapters.read_adapter(weights.path)
            adapters.set_adapter_tensors(self.peft, self.name, tensors)
            self._load_state(weights.path)

        return _done(work)


class FullTrainer(_LocalTrainer):
    """See `tercet.engine.base.Trainer`; the weights are a copy of the whole model's, float32."""

    def __init__(self, engine: LocalEngine, tensors: Mapping[str, Tensor] | None) -> None:
        self.model = engine.detached_copy(tensors)
        super().__init__(engine, dict(sorted(self.model.named_parameters())))

    def body(self) -> Body:
        """The model."""
        return self.engine.body(self.model)

    def sampler(self) -> LocalSampler:
        """See `Trainer`."""
        return LocalSampler(self.engine, Frozen(None, self._tensors(copied=True)))

    def fingerprint(self) -> str:
        """See `Trainer`."""
        return _fingerprint(self._tensors(copied=False))

    def save(self, directory: Path) -> Future[Weights]:
        """See `Trainer`."""

        def work() -> Weights:
            self.model.save_pretrained(directory, max_shard_size="100GB")
            self._save_state(directory)
            return Weights(directory)

        return _done(work)

    def load(self, weights: Weights) -> Future[None]:
        """See `Trainer`."""

        def work() -> None:
            tensors = _whole(load_file(weights.path / "model.safetensors"), self._tensors(copied=False))
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(tensors[name])
            self._load_state(weights.path)

        return _done(work)

    def _tensors(self, *, copied: bool) -> dict[str, Tensor]:
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: p.detach().clone() if copied else p.detach() for name, p in named}


def _whole(saved: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved model's tensors under every parameter name: tied parameters are saved once."""
    by_storage = {tensor.data_ptr(): saved[name] for name, tensor in wanted.items() if name in saved}
    missing = [name for name, tensor in wanted.items() if tensor.data_ptr() not in by_storage]
    if missing:
        raise CheckpointError(f"the saved model lacks {missing[0]} and {len(missing) - 1} more; it is of another model")
    return {name: by_storage[tensor.data_ptr()].to(tensor.device) for name, tensor in wanted.items()}


def _eos_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Every token that ends a text, lists included."""
    found: set[int] = set()
    generation = getattr(loaded.model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), loaded.tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token) for token in value)
    return frozenset(found)


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name].detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _done(work: Callable[[], Result]) -> Future[Result]:
    """Do the work now. A future that is already done keeps the order of requests without a thread."""
    future: Future[Result] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
