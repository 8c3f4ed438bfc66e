"""Continuous batching: many completions at once, each prompt computed once, finished rows replaced at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tercet.engine.collate import forest
from tercet.engine.draw import draw, uniforms
from tercet.engine.outputs import Body, forest_layout
from tercet.errors import EngineError
from tercet.models.tree_attention import Layout
from tercet.types import Completion, SamplingParams, StopReason

# A decode step over 128 rows costs far less a token than one over 8; beyond that it gains little.
MAX_ROWS = 128
PREFILL_TOKENS = 4096


class KeyValueCache:
    """Keys and values of every row: per layer (rows, kv_heads, capacity, d), allocated once."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Storage of a layer; `like` is (kv_heads, T, d)."""
        if layer not in self.keys:
            shape = (self.rows, like.shape[0], self.capacity, like.shape[-1])
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]

    def move(self, source: int, to: int, length: int) -> None:
        """Copy a row's first `length` entries."""
        for store in (*self.keys.values(), *self.values.values()):
            store[to, :, :length] = store[source, :, :length]


@dataclass(frozen=True)
class Prefill:
    """Attention over packed prompts that also files each prompt's keys and values under its rows."""

    layout: Layout
    cache: KeyValueCache
    paths: tuple[Tensor, ...]
    rows: tuple[tuple[int, ...], ...]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `tercet.models.tree_attention.Layout`."""
        keys, values = self.cache.layer(layer, key)
        for path, rows in zip(self.paths, self.rows, strict=True):
            k, v = key[:, path], value[:, path]
            for row in rows:
                keys[row, :, : len(path)] = k
                values[row, :, : len(path)] = v
        return self.layout.attend(layer, query, key, value, scale)


@dataclass(frozen=True)
class Decode:
    """One new token of each of R rows against that row's cache."""

    cache: KeyValueCache
    positions: Tensor
    bias: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `tercet.models.tree_attention.Layout`; here the row's tokens are the newest of R rows."""
        keys, values = self.cache.layer(layer, key)
        heads, rows, d = query.shape
        kv_heads, seen = key.shape[0], self.bias.shape[1]
        here = torch.arange(rows, device=query.device)
        keys[here, :, self.positions] = key.transpose(0, 1)
        values[here, :, self.positions] = value.transpose(0, 1)
        k = keys[:rows].view(rows * kv_heads, -1, d)[:, :seen]
        v = values[:rows].view(rows * kv_heads, -1, d)[:, :seen]
        q = query.transpose(0, 1).reshape(rows * kv_heads, heads // kv_heads, d)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        scores.view(rows, -1, seen).add_(self.bias[:, None])
        return torch.bmm(torch.softmax(scores, -1), v).view(rows, heads, d).transpose(0, 1)


@dataclass
class _Row:
    """A completion on its way."""

    prompt: int
    sample: int
    length: int
    uniform: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Stops:
    """What ends a completion."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    eos: frozenset[int]
    decode: Callable[[list[int]], str]

    def reason(self, tokens: list[int], limit: int) -> StopReason | None:
        """Why the completion ends after its last token, or None while it goes on."""
        if tokens[-1] in self.tokens:
            return "stop"
        if self.strings:
            # A character takes at most four byte-level tokens.
            window = 4 * max(map(len, self.strings)) + 4
            tail = self.decode(tokens[-window:])
            if any(string in tail for string in self.strings):
                return "stop"
        if tokens[-1] in self.eos:
            return "eos"
        return "length" if len(tokens) >= limit else None


def generate(
    body: Body,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    *,
    eos: frozenset[int],
    decode: Callable[[list[int]], str],
    max_rows: int = MAX_ROWS,
) -> list[list[Completion]]:
    """Draw `n` completions of every prompt.

    Args:
        body: The model; its weights must already be the sampler's.
        prompts: Token ids.
        params: How to draw.
        n: Completions a prompt.
        eos: Tokens that end a text for this model.
        decode: Tokens -> text, for stop strings.
        max_rows: Rows decoded side by side.

    Raises:
        EngineError: A prompt is empty or leaves no room for `max_tokens`.
    """
    context_tokens = body.context_tokens
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context_tokens - params.max_tokens:
            raise EngineError(
                f"prompt {i} has {len(prompt)} tokens; with max_tokens {params.max_tokens} it must have between 1 and "
                f"{context_tokens - params.max_tokens} (the model takes {context_tokens})"
            )
    if not prompts:
        return []
    stops = Stops(
        frozenset(s for s in params.stop if isinstance(s, int)),
        tuple(s for s in params.stop if isinstance(s, str)),
        eos,
        decode,
    )
    rows = min(max_rows, len(prompts) * n)
    loop = _Loop(body, prompts, params, stops, KeyValueCache(rows, max(map(len, prompts)) + params.max_tokens))
    waiting = deque((i, range(at, min(at + rows, n))) for i in range(len(prompts)) for at in range(0, n, rows))
    done: list[list[Completion | None]] = [[None] * n for _ in prompts]
    with torch.inference_mode():
        while waiting or loop.active:
            free = rows - len(loop.active)
            # A lone prompt fills the machine badly: let a quarter of the rows come free before the next ones enter.
            if waiting and (not loop.active or free >= max(len(waiting[0][1]), rows // 4)):
                loop.admit(waiting, free)
            else:
                loop.step()
            for row, completion in loop.leave():
                done[row.prompt][row.sample] = completion
    return [[completion for completion in group if completion is not None] for group in done]


class _Loop:
    """The rows being decoded; row i of the cache belongs to `active[i]`."""

    def __init__(
        self, body: Body, prompts: Sequence[Sequence[int]], params: SamplingParams, stops: Stops, cache: KeyValueCache
    ) -> None:
        self.body, self.prompts, self.params, self.stops, self.cache = body, prompts, params, stops, cache
        self.active: list[_Row] = []

    def admit(self, waiting: deque[tuple[int, range]], free: int) -> None:
        """Compute waiting prompts, each once for all its samples, and draw their first tokens."""
        taken: list[tuple[int, range]] = []
        tokens = 0
        while waiting and len(waiting[0][1]) <= free and (not taken or tokens < PREFILL_TOKENS):
            taken.append(waiting.popleft())
            free -= len(taken[-1][1])
            tokens += len(self.prompts[taken[-1][0]])
        packed = forest([self.prompts[i] for i, _ in taken])
        owners: list[tuple[int, ...]] = []
        fresh: list[_Row] = []
        for i, samples in taken:
            at = len(self.active) + len(fresh)
            owners.append(tuple(range(at, at + len(samples))))
            fresh += [
                _Row(i, j, len(self.prompts[i]), uniforms(self.params.seed, i, j, self.params.max_tokens))
                for j in samples
            ]
        paths = tuple(torch.from_numpy(path).to(self.body.device) for path in packed.paths)
        layout = Prefill(forest_layout(packed, self.body.device), self.cache, paths, tuple(owners))
        hidden = self.body.hidden(packed.tokens, packed.positions, layout)
        last = torch.stack([path[-1] for path in paths])
        logits = self.body.head(hidden[last])
        repeats = torch.tensor([len(samples) for _, samples in taken], device=logits.device)
        self.active += fresh
        self._draw(fresh, logits.repeat_interleave(repeats, 0))

    def step(self) -> None:
        """One more token for every active row."""
        newest = np.array([row.tokens[-1] for row in self.active])
        places = np.array([row.length + len(row.tokens) - 1 for row in self.active])
        positions = torch.from_numpy(places).to(self.body.device)
        seen = torch.arange(int(places.max()) + 1, device=self.body.device)
        bias = torch.zeros(len(places), len(seen), device=self.body.device)
        bias.masked_fill_(seen[None, :] > positions[:, None], float("-inf"))
        hidden = self.body.hidden(newest, places, Decode(self.cache, positions, bias))
        self._draw(self.active, self.body.head(hidden))

    def leave(self) -> list[tuple[_Row, Completion]]:
        """Take out the rows that ended, and close the gaps with the last rows."""
        gone: list[tuple[_Row, Completion]] = []
        for at in reversed(range(len(self.active))):
            row = self.active[at]
            reason = self.stops.reason(row.tokens, self.params.max_tokens)
            if reason is None:
                continue
            gone.append((row, Completion(tuple(row.tokens), tuple(row.logprobs), reason)))
            last = self.active.pop()
            if last is not row:
                self.active[at] = last
                self.cache.move(len(self.active), at, last.length + len(last.tokens))
        return gone

    def _draw(self, rows: list[_Row], logits: Tensor) -> None:
        uniform = torch.tensor([row.uniform[len(row.tokens)] for row in rows], device=logits.device)
        tokens, logprobs = draw(logits, self.params, uniform)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
