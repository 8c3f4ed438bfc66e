"""Keys and values while decoding: a prompt's once for all its samples, each row's own tokens apart from them.

Decoding reads every key and value once a step, and that is what its attention costs. So prompts are kept once, in
blocks of prompts of like length, and are read once for all rows that continue them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tercet.engine.collate import IntArray
from tercet.models.tree_attention import Layout

# A block's longest prompt is at most this many times its shortest, and some tokens more: what is added up to the
# longest is read for nothing, but every block costs a few calls a layer.
SPREAD, SLACK = 1.5, 16
FIRST_TOKENS = 32


@dataclass
class PromptBlock:
    """Prompts of like length: per layer keys and values (N, kv_heads, P, d), and the rows that continue them."""

    lengths: Tensor
    """(N,) tokens of each prompt."""
    rows: list[list[int]]
    """For each prompt the rows that continue it."""
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    tokens: int = field(init=False)
    """P, those of the longest prompt."""
    bias: Tensor | None = field(init=False, default=None)
    """(N, 1, 1, P): minus infinity beyond a prompt's end; None when all are as long."""
    read: Tensor = field(init=False)
    """(N, S) rows; where a prompt has fewer than S left, row 0 stands in."""
    write: Tensor = field(init=False)
    """The same, but what stands in is a row of its own, after the last there may be."""

    def __post_init__(self) -> None:
        self.tokens = int(self.lengths.max())
        if int(self.lengths.min()) < self.tokens:
            beyond = torch.arange(self.tokens, device=self.lengths.device) >= self.lengths[:, None]
            self.bias = torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, float("-inf"))
            self.bias = self.bias[:, None, None]

    def index(self, nobody: int) -> None:
        """Note again which rows there are, after they have changed; drop prompts that nobody continues any more."""
        alive = [i for i, rows in enumerate(self.rows) if rows]
        if 2 * len(alive) <= len(self.rows):
            kept = torch.tensor(alive, dtype=torch.long, device=self.lengths.device)
            self.rows, self.lengths = [self.rows[i] for i in alive], self.lengths[kept]
            self.keys, self.values = [k[kept] for k in self.keys], [v[kept] for v in self.values]
            self.bias = None if self.bias is None else self.bias[kept]
        samples = max(map(len, self.rows), default=0)
        full = [rows + [nobody] * (samples - len(rows)) for rows in self.rows]
        self.write = torch.tensor(full, dtype=torch.long, device=self.lengths.device)
        self.read = self.write.masked_fill(self.write == nobody, 0)


class KeyValueCache:
    """All prompt blocks, and of every row its own tokens: per layer (rows, kv_heads, tokens, d)."""

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        self.rows, self.max_tokens, self.device = rows, max_tokens, device
        self.blocks: list[PromptBlock] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Make room for prompts that enter together; which of them lie in each new block, the last `len` blocks."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        parts: list[list[int]] = []
        for i in order:
            # Elsewhere than on a CPU a call costs more than what it would spare.
            if parts and (self.device.type != "cpu" or lengths[i] <= SPREAD * lengths[parts[-1][0]] + SLACK):
                parts[-1].append(i)
            else:
                parts.append([i])
        for part in parts:
            ends = torch.tensor([lengths[i] for i in part], device=self.device)
            self.blocks.append(PromptBlock(ends, [list(rows[i]) for i in part]))
            self.blocks[-1].index(self.rows)
        return parts

    def store(self, layer: int, like_key: Tensor, like_value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values with room for so many tokens; `like` is (kv_heads, T, d)."""
        if layer == len(self.keys):
            room = min(self.max_tokens, FIRST_TOKENS)
            for kept, like in ((self.keys, like_key), (self.values, like_value)):
                kept.append(like.new_zeros(self.rows, like.shape[0], room, like.shape[2]))
        for kept in (self.keys, self.values):
            room = kept[layer].shape[2]
            if room < tokens:
                more = min(self.max_tokens, max(tokens, 2 * room)) - room
                kept[layer] = torch.nn.functional.pad(kept[layer], (0, 0, 0, more))
        return self.keys[layer], self.values[layer]

    def close(self, gone: Sequence[int], moves: Sequence[tuple[int, int]], tokens: int) -> None:
        """Take rows out; the rows of `moves` (from, to) then take over places of those that are gone."""
        if moves:
            source, to = (torch.tensor(side, device=self.device) for side in zip(*moves, strict=True))
            for store in (*self.keys, *self.values):
                store[to, :, :tokens] = store[source, :, :tokens]
        left, now = set(gone), dict(moves)
        for block in self.blocks:
            if any(row in left or row in now for rows in block.rows for row in rows):
                block.rows = [[now.get(row, row) for row in rows if row not in left] for rows in block.rows]
                block.index(self.rows)
        self.blocks = [block for block in self.blocks if block.rows]


@dataclass(frozen=True)
class Prefill:
    """Attention over packed prompts that also files their keys and values under their blocks."""

    layout: Layout
    blocks: Sequence[PromptBlock]
    places: Sequence[Tensor]
    """For each block (N, P): where in the row a prompt's tokens lie; whatever beyond its end."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `tercet.models.tree_attention.Layout`."""
        for block, place in zip(self.blocks, self.places, strict=True):
            block.keys.append(key.transpose(0, 1)[place].transpose(1, 2).contiguous())
            block.values.append(value.transpose(0, 1)[place].transpose(1, 2).contiguous())
        return self.layout.attend(layer, query, key, value, scale)


class Decode:
    """One new token of each of R rows against its prompt and its own tokens."""

    def __init__(self, cache: KeyValueCache, own: IntArray) -> None:
        """`own` (R,) counts the tokens of each row that are already kept."""
        self.cache, self.own = cache, torch.from_numpy(own).to(cache.device)
        self.rows = torch.arange(len(own), device=cache.device)
        self.tokens = int(own.max()) + 1
        self.even = int(own.min()) + 1 == self.tokens
        self.longest = max(block.tokens for block in cache.blocks)
        beyond = torch.arange(self.tokens, device=cache.device) > self.own[:, None]
        self.bias = torch.zeros(beyond.shape, device=cache.device).masked_fill_(beyond, float("-inf"))[:, None, None]
        self.scores: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `tercet.models.tree_attention.Layout`; here the row's tokens are the newest of R rows."""
        heads, rows, d = query.shape
        kv_heads, groups, tokens, longest = key.shape[0], heads // key.shape[0], self.tokens, self.longest
        keys, values = self.cache.store(layer, key, value, tokens)
        place = (slice(rows), slice(None), tokens - 1) if self.even else (self.rows, slice(None), self.own)
        keys[place] = key.transpose(0, 1)
        values[place] = value.transpose(0, 1)
        q = query.transpose(0, 1).mul(scale).reshape(rows, kv_heads, groups, d)
        scores = self._scores(kv_heads, groups, q)
        for block in self.cache.blocks:
            each = torch.bmm(_together(q, block.read), block.keys[layer].flatten(0, 1).transpose(1, 2))
            each = each.view(*block.keys[layer].shape[:2], -1, each.shape[-1])
            if block.bias is not None:
                each += block.bias
            scores[block.write.flatten(), :, :, : block.tokens] = _apart(each, block.read.shape[1])
        own = keys[:rows].flatten(0, 1)[:, :tokens].transpose(1, 2)
        scores[:rows, :, :, longest:] = torch.bmm(q.flatten(0, 1), own).view(rows, kv_heads, groups, tokens)
        if not self.even:
            scores[:rows, :, :, longest:] += self.bias
        weights = torch.softmax(scores[:rows], -1)
        own = values[:rows].flatten(0, 1)[:, :tokens]
        out = torch.bmm(weights[..., longest:].flatten(0, 1), own).view(rows, kv_heads, groups, -1)
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, 0, 0, self.cache.rows + 1 - rows))
        for block in self.cache.blocks:
            each = torch.bmm(
                _together(weights[..., : block.tokens], block.read), block.values[layer].flatten(0, 1)
            ).view(*block.values[layer].shape[:2], -1, out.shape[-1])
            out.index_add_(0, block.write.flatten(), _apart(each, block.read.shape[1]))
        return out[:rows].flatten(1, 2).transpose(0, 1)

    def _scores(self, kv_heads: int, groups: int, like: Tensor) -> Tensor:
        """(all rows + 1, kv_heads, groups, longest prompt + own tokens), the same for every layer.

        What a layer does not write stays minus infinity: the places between a row's prompt and the longest one.
        """
        shape = (self.cache.rows + 1, kv_heads, groups, self.longest + self.tokens)
        if self.scores is None or self.scores.shape != shape:
            self.scores = like.new_full(shape, float("-inf"))
        return self.scores


def _together(each: Tensor, read: Tensor) -> Tensor:
    """(R, kv_heads, groups, d) -> (N * kv_heads, S * groups, d): the rows that continue a prompt side by side."""
    return each[read].transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _apart(each: Tensor, samples: int) -> Tensor:
    """(N, kv_heads, S * groups, d) -> (N * S, kv_heads, groups, d)."""
    return each.view(*each.shape[:2], samples, -1, each.shape[3]).transpose(1, 2).flatten(0, 1)
