"""Keys and values while decoding: a prompt's once for all its samples, each row's own tokens apart from them.

Decoding reads every key and value once a step, and that is what its attention costs. So prompts are kept once, in
blocks of prompts of like length, and are read once for all rows that continue them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tercet.engine.collate import IntArray
from tercet.models.tree_attention import Layout, score_dtype, scorer

# A block's longest prompt is at most this many times its shortest, and some tokens more: what is added up to the
# longest is read for nothing, but every block costs a few calls a layer, which weigh more elsewhere than on a CPU.
SPREAD, SPREAD_ELSEWHERE, SLACK = 1.5, 4.0, 16
# Room for tokens comes in such steps: products over whole vectors, without gaps, take half the time of others.
PROMPT_STEP, OWN_STEP = 8, 32
# Products are over whole steps of rows, so that they have few shapes: see `tercet.models.frozen_llama.PACKED_STEP`.
ROW_STEP = 8


@dataclass
class PromptBlock:
    """Prompts of like length: per layer keys and values (N, kv_heads, P, d), and the rows that continue them."""

    lengths: Tensor
    """(N,) tokens of each prompt."""
    rows: list[list[int]]
    """For each prompt the rows that continue it."""
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    samples: int = field(init=False)
    """S, places for rows of each prompt."""
    number: int = field(init=False, default_factory=itertools.count().__next__)
    """Of all blocks there ever were: an address is given to another block when one is gone."""
    tokens: int = field(init=False)
    """P, those of the longest prompt and what is missing to a whole step."""
    bias: Tensor | None = field(init=False, default=None)
    """(N, 1, 1, P): minus infinity beyond a prompt's end; None when all are as long."""

    def __post_init__(self) -> None:
        self.tokens = _whole(int(self.lengths.max()), PROMPT_STEP)
        if int(self.lengths.min()) < self.tokens:
            beyond = torch.arange(self.tokens, device=self.lengths.device) >= self.lengths[:, None]
            self.bias = torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, float("-inf"))
            self.bias = self.bias[:, None, None]
        self.samples = max(map(len, self.rows))

    def compact(self) -> None:
        """Drop prompts that nobody continues any more, and places for rows, when half of them are for nothing."""
        most = max(map(len, self.rows), default=0)
        self.samples = most if 2 * most <= self.samples else self.samples
        alive = [i for i, rows in enumerate(self.rows) if rows]
        if 2 * len(alive) <= len(self.rows):
            kept = torch.tensor(alive, dtype=torch.long, device=self.lengths.device)
            self.rows, self.lengths = [self.rows[i] for i in alive], self.lengths[kept]
            self.keys, self.values = [k[kept] for k in self.keys], [v[kept] for v in self.values]
            self.bias = None if self.bias is None else self.bias[kept]


@dataclass(frozen=True)
class Slots:
    """Where rows lie when they are sorted by the prompts they continue; a slot is one key head of one row.

    Block by block (N, kv_heads, S), so that the queries of all rows of a prompt are one product with its keys.
    """

    read: Tensor
    """(M,) rows x kv_heads; where a prompt has fewer than S rows left, row 0 stands in."""
    write: Tensor
    """The same, but what stands in is a row of its own, after the last there may be."""
    inverse: Tensor
    """(all rows x kv_heads,) the slot of each; of those that are not there, any."""
    sizes: tuple[tuple[int, int], ...]
    """N x kv_heads, and S, of each block."""

    @classmethod
    def of(cls, blocks: Sequence[PromptBlock], kv_heads: int, nobody: int, device: torch.device) -> Slots:
        """Slots of all rows there may be; `nobody` is the number of the row after them, which nothing reads."""
        full = [[each + [nobody] * (block.samples - len(each)) for each in block.rows] for block in blocks]
        heads = torch.arange(kv_heads)[:, None]
        write = torch.cat([(torch.tensor(each)[:, None] * kv_heads + heads).flatten() for each in full])
        inverse = torch.zeros((nobody + 1) * kv_heads, dtype=torch.long)
        inverse[write] = torch.arange(len(write))
        read = write.masked_fill(write >= nobody * kv_heads, 0)
        sizes = tuple((len(each) * kv_heads, len(each[0])) for each in full)
        return cls(read.to(device), write.to(device), inverse[: nobody * kv_heads].to(device), sizes)

    def by_block(self, each: Tensor) -> tuple[Tensor, ...]:
        """What slots have (M, ...), apart for each block."""
        return torch.split(each, [n * samples for n, samples in self.sizes])

    def products(self, each: Tensor) -> list[Tensor]:
        """What slots have (M, groups, d), for one product a block: (N x kv_heads, S x groups, d)."""
        return [part.view(n, -1, each.shape[2]) for part, (n, _) in zip(self.by_block(each), self.sizes, strict=True)]

    def take_over(self, other: Slots) -> None:
        """Write others of the same sizes into these tensors."""
        for name in ("read", "write", "inverse"):
            getattr(self, name).copy_(getattr(other, name))


class KeyValueCache:
    """All prompt blocks, and of every row its own tokens: per layer (rows, kv_heads, tokens, d)."""

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        self.rows, self.max_tokens, self.device = whole_rows(rows), max_tokens, device
        self.spread = SPREAD if device.type == "cpu" else SPREAD_ELSEWHERE
        self.blocks: list[PromptBlock] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._slots: Slots | None = None
        self._moved = True

    def slots(self, kv_heads: int) -> Slots:
        """Where rows lie now."""
        if self._slots is None or self._moved:
            now = Slots.of(self.blocks, kv_heads, self.rows, self.device)
            if self._slots is not None and self._slots.sizes == now.sizes:
                self._slots.take_over(now)
            else:
                self._slots = now
            self._moved = False
        return self._slots

    def note_slots(self) -> None:
        """Look where rows lie before a step asks."""
        if self.blocks[0].keys:
            self.slots(self.blocks[0].keys[0].shape[1])

    @property
    def shape(self) -> object:
        """Equal as long as all tensors of a step have the same shapes and addresses, its own tokens' room aside."""
        return tuple((block.number, len(block.rows), block.samples) for block in self.blocks)

    def add(self, lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Make room for prompts that enter together; which of them lie in each new block, the last `len` blocks."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        parts: list[list[int]] = []
        for i in order:
            if parts and lengths[i] <= self.spread * lengths[parts[-1][0]] + SLACK:
                parts[-1].append(i)
            else:
                parts.append([i])
        for part in parts:
            ends = torch.tensor([lengths[i] for i in part], device=self.device)
            self.blocks.append(PromptBlock(ends, [list(rows[i]) for i in part]))
        self._moved = True
        return parts

    def room(self, tokens: int) -> int:
        """For how many own tokens of a row there is room when so many are needed."""
        return min(self.max_tokens, max(_whole(tokens, OWN_STEP), self.keys[0].shape[2] if self.keys else 0))

    def store(self, layer: int, like_key: Tensor, like_value: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values with so much room; `like` is (kv_heads, T, d)."""
        if layer == len(self.keys):
            for kept, like in ((self.keys, like_key), (self.values, like_value)):
                kept.append(like.new_zeros(self.rows, like.shape[0], room, like.shape[2]))
        for kept in (self.keys, self.values):
            more = room - kept[layer].shape[2]
            if more:
                kept[layer] = torch.nn.functional.pad(kept[layer], (0, 0, 0, more))
        return self.keys[layer], self.values[layer]

    def close(self, gone: Sequence[int], moves: Sequence[tuple[int, int]], tokens: int) -> None:
        """Take rows out; the rows of `moves` (from, to) then take over places of those that are gone."""
        if moves:
            source, to = (torch.tensor(side, device=self.device) for side in zip(*moves, strict=True))
            for store in (*self.keys, *self.values):
                store[to, :, :tokens] = store[source, :, :tokens]
        needed = _whole(tokens + 1, OWN_STEP)
        if self.keys and 2 * needed <= self.keys[0].shape[2]:
            for kept in (self.keys, self.values):
                kept[:] = [each[:, :, :needed].contiguous() for each in kept]
        left, now = set(gone), dict(moves)
        for block in self.blocks:
            if any(row in left or row in now for rows in block.rows for row in rows):
                block.rows = [[now.get(row, row) for row in rows if row not in left] for rows in block.rows]
                block.compact()
        self.blocks = [block for block in self.blocks if block.rows]
        self._moved = True


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

    def __init__(self, cache: KeyValueCache, own: Tensor, room: int, even: int | None = None) -> None:
        """Look at what there is.

        Args:
            cache: Keys and values so far.
            own: (R,) tokens of each row that are already kept.
            room: For how many of them there is room.
            even: How many they are, when they are as many in every row.
        """
        self.cache, self.own, self.tokens, self.even = cache, own, room, even
        self.rows = torch.arange(len(own), device=cache.device)
        self.longest = max(block.tokens for block in cache.blocks)
        beyond = torch.arange(room, device=cache.device) > own[:, None]
        self.bias = torch.zeros(beyond.shape, device=cache.device).masked_fill_(beyond, float("-inf"))[:, None, None]
        self.scores: Tensor | None = None
        self.multiply: Callable[[Tensor, Tensor], Tensor] = torch.bmm

    @classmethod
    def of(cls, cache: KeyValueCache, own: IntArray) -> Decode:
        """The same of numbers (R,) that are at hand."""
        most = int(own.max())
        even = most if own.min() == most else None
        return cls(cache, torch.from_numpy(own).to(cache.device), cache.room(most + 1), even)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `tercet.models.tree_attention.Layout`; here the row's tokens are the newest of R rows."""
        heads, rows, d = query.shape
        kv_heads, groups, tokens, longest = key.shape[0], heads // key.shape[0], self.tokens, self.longest
        keys, values = self.cache.store(layer, key, value, tokens)
        place = (self.rows, slice(None), self.own) if self.even is None else (slice(rows), slice(None), self.even)
        keys[place] = key.transpose(0, 1)
        values[place] = value.transpose(0, 1)
        slots, scores = self.cache.slots(kv_heads), self._scores(kv_heads, groups, query)
        q = query.transpose(0, 1).mul(scale).reshape(rows * kv_heads, groups, d)
        queries = slots.products(q.index_select(0, slots.read))
        for block, asked, to in zip(self.cache.blocks, queries, slots.by_block(slots.write), strict=True):
            each = self.multiply(asked, block.keys[layer].flatten(0, 1).transpose(1, 2))
            if block.bias is not None:
                each.view(*block.keys[layer].shape[:2], -1, block.tokens).add_(block.bias)
            scores[to, :, : block.tokens] = each.view(len(to), groups, -1)
        own = scores[: rows * kv_heads, :, longest:]
        of_own = self.multiply(q, keys[:rows].flatten(0, 1).transpose(1, 2)).view(rows, kv_heads, groups, tokens)
        torch.add(of_own, self.bias, out=own.view(rows, kv_heads, groups, tokens))
        weights = torch.softmax(scores[: rows * kv_heads], -1)
        if weights.dtype != values.dtype:
            weights = weights.to(values.dtype)
        out = torch.bmm(weights[..., longest:], values[:rows].flatten(0, 1))
        told = out.new_empty(len(slots.read), groups, d)
        shares = weights[..., :longest].index_select(0, slots.read)
        for block, share, into in zip(self.cache.blocks, slots.products(shares), slots.products(told), strict=True):
            torch.bmm(share[..., : block.tokens], block.values[layer].flatten(0, 1), out=into)
        out += told.index_select(0, slots.inverse[: rows * kv_heads])
        return out.view(rows, heads, d).transpose(0, 1)

    def _scores(self, kv_heads: int, groups: int, like: Tensor) -> Tensor:
        """(all rows + 1 x kv_heads, groups, longest prompt + own tokens), the same for every layer.

        What a layer does not write stays minus infinity: the places between a row's prompt and the longest one.
        """
        shape = ((self.cache.rows + 1) * kv_heads, groups, self.longest + self.tokens)
        if self.scores is None or self.scores.shape != shape:
            self.multiply = scorer(like)
            self.scores = like.new_full(shape, float("-inf"), dtype=score_dtype(like))
        return self.scores


def whole_rows(rows: int) -> int:
    """How many rows are computed where there are so many: what is beyond is computed for nothing."""
    return rows if rows < ROW_STEP else _whole(rows, ROW_STEP)


def _whole(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
