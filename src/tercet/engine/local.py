"""The engine on this machine: torch, on the CPU or one GPU.

One base model is in memory. Trainers put adapters on it through peft. Frozen weights (a sampler's) are kept as small
adapter tensors and merged when they are used: while they are laid out for the CPU (`tercet.models.frozen_llama`), or
where that is not done into one work copy whose unadapted parts are the base's own tensors. So a policy, its reference
and a judge together cost one base, one such copy and a few megabytes each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tercet.engine.base import Sampler
from tercet.engine.bodies import (
    BodySampler,
    BodyScorer,
    BodyTrainer,
    Language,
    done,
    fingerprint,
    head_of,
    new_head,
    same_bits,
)  # fmt: skip
from tercet.engine.budgets import Budgets
from tercet.engine.outputs import Body
from tercet.engine.sampler import MAX_ROWS
from tercet.errors import CheckpointError, EngineError, ModelError
from tercet.machine import memory_bytes
from tercet.models import adapters
from tercet.models.cpu import keep_freed_memory
from tercet.models.frozen_llama import NONE, Updates, forget, takes
from tercet.models.lean_layers import slim
from tercet.models.load import LoadedModel
from tercet.models.lora_linear import fuse
from tercet.models.memory import BYTES, estimate, shape
from tercet.models.padded import OwnHead
from tercet.models.quiet import quiet
from tercet.types import Head, LoraConfig, Weights

HEAD_FILE = "head.safetensors"
# One part in so many of the memory may be keys and values of rows being sampled.
CACHE_SHARE = 4


@dataclass(frozen=True, eq=False)
class Frozen:
    """Weights that no longer change: an adapter's tensors, a whole model's, or (neither) the base's; and a head's."""

    lora: LoraConfig | None = None
    tensors: Mapping[str, Tensor] | None = None
    head: Tensor | None = None

    def all_tensors(self) -> dict[str, Tensor]:
        """Everything that was trained, by name."""
        return with_head(self.tensors or {}, self.head)


def with_head(tensors: Mapping[str, Tensor], head: Tensor | None) -> dict[str, Tensor]:
    """Trained tensors with the head's among them."""
    return {**tensors, **({} if head is None else {adapters.HEAD_KEY: head})}


def cache_tokens(loaded: LoadedModel) -> int | None:
    """Of how many tokens keys and values, in the base's dtype, fit into a quarter of the memory where the model is;
    None of a kind of model whose sizes are not known."""
    device, dtype = loaded.model.device, str(loaded.model.dtype).removeprefix("torch.")
    on_cpu = device.type == "cpu"
    whole = memory_bytes() if on_cpu else int(torch.cuda.get_device_properties(device).total_memory)
    try:
        sizes = shape(loaded.model.config.to_dict())
    except ModelError:
        return None
    one = estimate(sizes, sampled_rows=1, row_tokens=1, dtype=dtype if dtype in BYTES else "float32", on_cpu=on_cpu)
    return whole // CACHE_SHARE // one.kv_cache


def width(frozen: Frozen, base: torch.dtype, *, on_cpu: bool) -> int:
    """How many times a number of the keys and values of frozen weights takes the bytes that `cache_tokens` counts."""
    # Attention on a CPU is in float32, and an adapter is merged into the base's numbers.
    if on_cpu or frozen.lora is not None or not frozen.tensors:
        return 1
    return max(1, *(tensor.dtype.itemsize // base.itemsize for tensor in frozen.tensors.values()))


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
        if loaded.model.device.type == "cpu":
            keep_freed_memory()
        self.budgets = Budgets(
            micro_batch_tokens=micro_batch_tokens,
            score_tokens=score_tokens,
            max_rows=max_rows,
            cache_tokens=cache_tokens(loaded),
        )
        self.language = Language(frozenset(loaded.eos_token_ids), lambda tokens: str(loaded.tokenizer.decode(tokens)))
        self.model = loaded.model
        self.peft: PeftModel | None = None
        self._adapters = 0
        self._base = dict(self.model.named_parameters(remove_duplicate=False))
        # Made before the first adapter, so that it stays plain; it shares every tensor with the base.
        shared = {id(parameter): parameter for parameter in self._base.values()}
        self._work: PreTrainedModel = copy.deepcopy(self.model, memo=dict(shared))
        self._work_holds: Frozen | None = None
        self._updates: Updates = NONE
        self._read: WeakValueDictionary[tuple[Path, int, int, int], Frozen] = WeakValueDictionary()
        self._buffers: dict[str, nn.Parameter] = {}

    @property
    def context_tokens(self) -> int:
        """See `Engine`."""
        return self.loaded.context_tokens

    def trainer(
        self,
        *,
        init: Weights | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
        head: Head | None = None,
    ) -> LoraTrainer | FullTrainer:
        """See `Engine`. An adapter given as `init` brings its own rank and targets.

        Raises:
            EngineError: `init` is a whole model, and an adapter was asked for.
        """
        saved = None if init is None else self._frozen(init)
        if saved is not None and saved.lora is not None:
            lora = saved.lora
        elif saved is not None and lora is not None:
            raise EngineError(
                f"{init} holds a whole model, but an adapter sits on the base: load it as the base model, or train "
                "the whole model (lora=None)"
            )
        value_head = None if saved is None or saved.head is None else head_of(saved.head)
        if head is not None:
            width = self.body(self.model).head.in_features
            value_head = new_head(width, head, seed=seed).to(self._device())
        if lora is None:
            return FullTrainer(self, None if saved is None else saved.tensors, value_head)
        name = f"adapter{self._adapters}"
        self._adapters += 1
        self.peft = adapters.add_adapter(self.peft or self.model, name, lora, base=self.loaded.name, seed=seed)
        try:
            fuse(self.peft)
            slim(self.peft)
            trainer = LoraTrainer(self, name, lora, value_head)
            if saved is not None and saved.tensors is not None:
                adapters.set_adapter_tensors(self.peft, name, dict(saved.tensors))
        except Exception:
            adapters.remove_adapter(self.peft, name)
            raise
        return trainer

    def sampler(self, weights: Weights | None = None) -> BodySampler:
        """See `Engine`."""
        return self.frozen_sampler(Frozen() if weights is None else self._frozen(weights))

    def frozen_sampler(self, frozen: Frozen) -> BodySampler:
        """A sampler of weights that no longer change."""
        return BodySampler(
            lambda: self.work_body(frozen),
            frozen.all_tensors(),
            self.language,
            self.budgets,
            width(frozen, self.model.dtype, on_cpu=self._device().type == "cpu"),
        )

    def scorer(self, weights: Weights) -> BodyScorer:
        """See `Engine`."""
        return self.frozen_scorer(self._frozen(weights), str(weights.path))

    def has_head(self, weights: Weights) -> bool:
        """Whether weights were saved with a head."""
        return self._frozen(weights).head is not None

    def frozen_scorer(self, frozen: Frozen, name: str = "these weights") -> BodyScorer:
        """A scorer of weights that no longer change.

        Raises:
            EngineError: They have no head.
        """
        if frozen.head is None:
            raise EngineError(f"{name} have no head to score with: they are a policy's, not a reward model's")
        return BodyScorer(lambda: self.work_body(frozen), frozen.all_tensors(), self.budgets)

    def body(self, model: PreTrainedModel, value_head: nn.Linear | None = None, updates: Updates = NONE) -> Body:
        """The parts of a model of the base's architecture."""
        trunk: nn.Module = getattr(model, self.model.base_model_prefix)
        untyped: Any = model
        head = untyped.get_output_embeddings() if self.loaded.plain_head else OwnHead(model)
        whole = None if self.loaded.why_no_tree is None else model
        return Body(trunk, head, self._device(), self.context_tokens, value_head, whole, updates)

    def work_body(self, frozen: Frozen) -> Body:
        """The work copy, holding the given weights."""
        if self._work_holds is not frozen:
            self._fill(frozen)
            self._work_holds = frozen
        return self.body(self._work, None if frozen.head is None else head_of(frozen.head), self._updates)

    def make_room(self) -> None:
        """Drop the weights laid out for sampling: after a gradient step they would be others in any case."""
        forget(self.body(self._work).trunk)

    def detached_copy(self, tensors: Mapping[str, Tensor] | None) -> PreTrainedModel:
        """A trainable model of its own, float32 whatever the base is: the base's weights or the given ones."""
        own = {
            id(p): nn.Parameter((p if tensors is None else tensors[name]).detach().clone().float())
            for name, p in self._base.items()
        }
        memo = {id(p): own[id(p)] for p in self._base.values()}
        model: PreTrainedModel = copy.deepcopy(self._plain(), memo=dict(memo))
        model.requires_grad_(True)
        model.train(False)
        return model

    def _plain(self) -> PreTrainedModel:
        """The work copy holding the base's weights: the base without adapters."""
        self.work_body(Frozen())
        return self._work

    def _fill(self, frozen: Frozen) -> None:
        """Point the work copy's parameters at the base's, at merged buffers, or at a whole model's tensors."""
        self._work_holds, self._updates = None, NONE
        if frozen.tensors is not None and frozen.lora is None:
            self._point({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in frozen.tensors.items()})
            return
        self._point(self._base)
        if frozen.tensors is not None and frozen.lora is not None:
            found = adapters.weight_updates(frozen.lora, dict(frozen.tensors))
            by_layer = {self._work.get_submodule(name): update for name, update in found.items()}
            if self._merges_late(by_layer):
                self._updates = by_layer
            else:
                self._point(self._merged(found))

    def _point(self, values: Mapping[str, nn.Parameter]) -> None:
        """Put parameters into the work copy."""
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self._work.get_submodule(owner), leaf, value)

    def _merges_late(self, updates: Updates) -> bool:
        """Whether adapters need not be merged in the work copy."""
        body = self.body(self._work)
        return body.whole is None and takes(body.trunk, body.head, updates)

    def _merged(self, updates: Mapping[str, adapters.Update]) -> dict[str, nn.Parameter]:
        """Weights with their updates, in buffers that the next ones take over."""
        for layer, update in updates.items():
            base = self._base[f"{layer}.weight"]
            if f"{layer}.weight" not in self._buffers:
                self._buffers[f"{layer}.weight"] = nn.Parameter(torch.empty_like(base), requires_grad=False)
            with torch.no_grad():
                whole = adapters.merged(self._work.get_submodule(layer), base, *update)
                self._buffers[f"{layer}.weight"].copy_(whole)
        return {f"{layer}.weight": self._buffers[f"{layer}.weight"] for layer in updates}

    def _frozen(self, weights: Weights) -> Frozen:
        if adapters.is_adapter(weights.path):
            config, tensors = adapters.read_adapter(weights.path)
            tensors = {name: tensor.to(self._device()) for name, tensor in tensors.items()}
            head = tensors.pop(adapters.HEAD_KEY, None)
            return Frozen(config, tensors, head)
        path = weights.path / "model.safetensors"
        if not path.is_file():
            raise EngineError(f"{weights.path} holds neither an adapter nor model.safetensors")
        # A reference is often the policy that is compared with as well: read once for as long as somebody has it.
        now = path.stat()
        key = (path.resolve(), now.st_ino, now.st_size, now.st_mtime_ns)
        found = self._read.get(key)
        if found is None:
            found = Frozen(None, _whole(load_file(path), self._base), _read_head(weights.path, self._device()))
            self._read[key] = found
        return found

    def _device(self) -> torch.device:
        return next(iter(self._base.values())).device


class LoraTrainer(BodyTrainer):
    """See `tercet.engine.base.Trainer`; the weights are one adapter's."""

    def __init__(self, engine: LocalEngine, name: str, lora: LoraConfig, value_head: nn.Linear | None) -> None:
        assert engine.peft is not None
        super().__init__(adapters.adapter_parameters(engine.peft, name), engine.budgets, value_head, engine.make_room)
        self.engine, self.context_tokens = engine, engine.context_tokens
        self.name, self.lora, self.peft = name, lora, engine.peft

    def body(self) -> Body:
        """The base with this adapter active."""
        if self.peft.active_adapters != [self.name]:
            self.peft.set_adapter(self.name)
        return self.engine.body(self.engine.model, self.value_head)

    def sampler(self) -> BodySampler:
        """See `Trainer`."""
        return self.engine.frozen_sampler(self._frozen())

    def scorer(self) -> BodyScorer:
        """See `Trainer`."""
        return self.engine.frozen_scorer(self._frozen())

    def _frozen(self) -> Frozen:
        return Frozen(self.lora, adapters.adapter_tensors(self.peft, self.name), self.head_weight())

    def fingerprint(self) -> str:
        """See `Trainer`."""
        return fingerprint(self._frozen().all_tensors())

    def save(self, directory: Path) -> Future[Weights]:
        """See `Trainer`."""

        def work() -> Weights:
            adapters.save_adapter(self.peft, self.name, directory, self.head_weight())
            self.save_state(directory)
            return Weights(directory)

        return done(work)

    def load(self, weights: Weights) -> Future[None]:
        """See `Trainer`."""

        def work() -> None:
            _, tensors = adapters.read_adapter(weights.path)
            adapters.set_adapter_tensors(self.peft, self.name, tensors)
            self.set_head(tensors.get(adapters.HEAD_KEY))
            self.load_state(weights.path)

        return done(work)

    def close(self) -> None:
        """See `Trainer`."""
        super().close()
        adapters.remove_adapter(self.peft, self.name)


class FullTrainer(BodyTrainer):
    """See `tercet.engine.base.Trainer`; the weights are a copy of the whole model's, float32."""

    def __init__(self, engine: LocalEngine, tensors: Mapping[str, Tensor] | None, value_head: nn.Linear | None) -> None:
        self.model = engine.detached_copy(tensors)
        super().__init__(dict(sorted(self.model.named_parameters())), engine.budgets, value_head, engine.make_room)
        self.engine, self.context_tokens = engine, engine.context_tokens

    def body(self) -> Body:
        """The model."""
        return self.engine.body(self.model, self.value_head)

    def sampler(self) -> BodySampler:
        """See `Trainer`."""
        return self.engine.frozen_sampler(self._frozen())

    def scorer(self) -> BodyScorer:
        """See `Trainer`."""
        return self.engine.frozen_scorer(self._frozen())

    def _frozen(self) -> Frozen:
        return Frozen(None, self._tensors(copied=True), self.head_weight())

    def fingerprint(self) -> str:
        """See `Trainer`."""
        return fingerprint(with_head(self._tensors(copied=False), self.head_weight()))

    def is_held_by(self, sampler: Sampler) -> bool:
        """Whether a sampler holds these weights, to the bit. They are read where they lie: a hash of a whole model
        takes seconds."""
        ours = with_head(self._tensors(copied=False), self.head_weight())
        return isinstance(sampler, BodySampler) and same_bits(ours, sampler.tensors)

    def save(self, directory: Path) -> Future[Weights]:
        """See `Trainer`."""

        def work() -> Weights:
            with quiet():
                self.model.save_pretrained(directory, max_shard_size="100GB")
            if (head := self.head_weight()) is not None:
                save_file({adapters.HEAD_KEY: head.cpu()}, directory / HEAD_FILE)
            self.save_state(directory)
            return Weights(directory)

        return done(work)

    def load(self, weights: Weights) -> Future[None]:
        """See `Trainer`."""

        def work() -> None:
            tensors = _whole(load_file(weights.path / "model.safetensors"), self._tensors(copied=False))
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(tensors[name])
            self.set_head(_read_head(weights.path, self.engine.body(self.model).device))
            self.load_state(weights.path)

        return done(work)

    def _tensors(self, *, copied: bool) -> dict[str, Tensor]:
        # Once for each parameter: a tied one has two names.
        own = {id(p): p.detach().clone() if copied else p.detach() for p in self.model.parameters()}
        return {name: own[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)}


def _read_head(directory: Path, device: torch.device) -> Tensor | None:
    path = directory / HEAD_FILE
    return load_file(path)[adapters.HEAD_KEY].to(device) if path.is_file() else None


def _whole(saved: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved model's tensors under every parameter name: tied parameters are saved once."""
    by_storage = {tensor.data_ptr(): saved[name] for name, tensor in wanted.items() if name in saved}
    missing = [name for name, tensor in wanted.items() if tensor.data_ptr() not in by_storage]
    if missing:
        raise CheckpointError(f"the saved model lacks {missing[0]} and {len(missing) - 1} more; it is of another model")
    return {name: by_storage[tensor.data_ptr()].to(tensor.device) for name, tensor in wanted.items()}
