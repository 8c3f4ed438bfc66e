"""Continuous batching: many completions at once, each prompt computed once, finished rows replaced at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tercet.engine.collate import IntArray, forest
from tercet.engine.draw import draw, origins, uniforms
from tercet.engine.graphed import GraphedStep, given_up, recorder
from tercet.engine.kv_cache import Decode, KeyValueCache, Prefill, whole_rows
from tercet.engine.outputs import Body, forest_layout
from tercet.engine.padded import generate_padded
from tercet.errors import EngineError
from tercet.models.logprobs import logits_of
from tercet.types import Completion, SamplingParams, StopReason

# A decode step over 128 rows costs far less a token than one over 8; beyond that it gains little.
MAX_ROWS = 128
PREFILL_TOKENS = 4096
# What decoding gives for bytes that are no whole character.
UNREADABLE = "\ufffd"


@dataclass(frozen=True)
class Stops:
    """What ends a completion.

    Stop strings are looked for only after tokens in which one may end: most texts are never decoded.
    """

    tokens: frozenset[int]
    strings: tuple[str, ...]
    eos: frozenset[int]
    decode: Callable[[list[int]], str]
    _may_end: dict[int, bool] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of each token that came so far, whether a stop string may end in it."""

    @classmethod
    def of(cls, params: SamplingParams, eos: frozenset[int], decode: Callable[[list[int]], str]) -> Stops:
        """What ends a completion drawn so, with the model's own ends of a text."""
        tokens = frozenset(stop for stop in params.stop if isinstance(stop, int))
        return cls(tokens, tuple(stop for stop in params.stop if isinstance(stop, str)), eos, decode)

    def reason(self, tokens: list[int], limit: int) -> StopReason | None:
        """Why the completion ends after its last token, or None while it goes on, as it did after all before."""
        if tokens[-1] in self.tokens:
            return "stop"
        if self.may_end_a_string(tokens[-1]):
            # A character takes at most four byte-level tokens.
            window = 4 * max(map(len, self.strings)) + 4
            tail = self.decode(tokens[-window:])
            if any(string in tail for string in self.strings):
                return "stop"
        if tokens[-1] in self.eos:
            return "eos"
        return "length" if len(tokens) >= limit else None

    def candidates(self, newest: IntArray, count: IntArray, limit: int) -> list[int]:
        """The rows of which `reason` has to be asked."""
        asked = np.isin(newest, sorted(self.tokens | self.eos)) | (count >= limit)
        if self.strings:
            asked |= np.array([self.may_end_a_string(token) for token in newest.tolist()], dtype=bool)
        found: list[int] = np.flatnonzero(asked).tolist()
        return found

    def may_end_a_string(self, token: int) -> bool:
        """Whether a stop string may be in a text with this token, and not in the text before it."""
        if not self.strings:
            return False
        if token not in self._may_end:
            self._may_end[token] = self._asked_after(token)
        return self._may_end[token]

    def _asked_after(self, token: int) -> bool:
        text, twice = self.decode([token]), self.decode([token, token])
        joined = twice in (text + text, f"{text} {text}")
        # Part of a character, or a decoder with ways of its own: only the whole text tells.
        if not text or not joined or any(UNREADABLE in each for each in (text, *self.strings)):
            return True
        # Many decoders leave out the space before the first word.
        added = (text, f" {text}")
        starts = {each[:end] for each in added for end in range(1, len(each) + 1)}
        return any(string in added[1] or string.endswith(tuple(starts)) for string in self.strings)


def generate(
    body: Body,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    *,
    eos: frozenset[int],
    decode: Callable[[list[int]], str],
    max_rows: int = MAX_ROWS,
    cache_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
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
        cache_tokens: Fewer of them, where that many full rows would have more tokens than this.
        seeds: One a prompt, which is then drawn as if it were alone; None draws prompt i as number i under
            `params.seed`.

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
    if not prompts or not n:
        return [[] for _ in prompts]
    stops = Stops.of(params, eos, decode)
    rows = rows_at_once(prompts, params, n, max_rows, cache_tokens)
    roots = origins(params, seeds, len(prompts))
    if body.whole is not None:
        return generate_padded(body.whole, prompts, params, n, origins=roots, ends=stops.reason, max_rows=rows)
    waiting = deque((i, range(at, min(at + rows, n))) for i in range(len(prompts)) for at in range(0, n, rows))
    done: list[list[Completion | None]] = [[None] * n for _ in prompts]
    with torch.inference_mode():
        loop = _Loop(body, prompts, params, stops, rows, roots)
        while waiting or len(loop.rows):
            free = rows - len(loop.rows)
            # A lone prompt fills the machine badly: let a quarter of the rows come free before the next ones enter.
            if waiting and (not len(loop.rows) or free >= max(len(waiting[0][1]), rows // 4)):
                loop.admit(waiting, free)
            else:
                loop.step()
            for place, sample, completion in loop.leave():
                done[place][sample] = completion
    return [[one for one in group if one is not None] for group in done]


def rows_at_once(
    prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, most: int, cache_tokens: int | None
) -> int:
    """How many rows are decoded side by side; see `generate`."""
    rows = min(most, len(prompts) * n)
    if cache_tokens is None or not prompts:
        return rows
    return max(1, min(rows, cache_tokens // (max(map(len, prompts)) + params.max_tokens)))


class _Rows:
    """The completions on their way, one a row; the arrays have room for all rows there may be."""

    def __init__(self, rows: int, max_tokens: int) -> None:
        self.n = 0
        self.prompt, self.sample, self.prompt_tokens, self.count = (np.zeros(rows, dtype=np.int64) for _ in range(4))
        self.uniform = np.zeros((rows, max_tokens))
        self.tokens = np.zeros((rows, max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((rows, max_tokens), dtype=np.float32)

    def __len__(self) -> int:
        return self.n

    def enter(self, prompt: int, sample: int, prompt_tokens: int, uniform: np.ndarray) -> None:
        """One more row."""
        self.prompt[self.n], self.sample[self.n], self.prompt_tokens[self.n] = prompt, sample, prompt_tokens
        self.uniform[self.n], self.count[self.n] = uniform, 0
        self.n += 1

    @property
    def newest(self) -> IntArray:
        """The last token of each row."""
        token: IntArray = self.tokens[np.arange(self.n), self.count[: self.n] - 1]
        return token

    def close(self, gone: Sequence[int]) -> list[tuple[int, int]]:
        """Take rows out; the last ones take over their places. Which went where."""
        left = set(gone)
        self.n -= len(left)
        stay = [row for row in range(self.n, self.n + len(left)) if row not in left]
        moves = list(zip(stay, sorted(row for row in left if row < self.n), strict=True))
        if moves:
            source, to = map(list, zip(*moves, strict=True))
            for array in (
                self.prompt, self.sample, self.prompt_tokens, self.count, self.uniform, self.tokens, self.logprobs
            ):  # fmt: skip
                array[to] = array[source]
        return moves


class _Loop:
    """The rows being decoded."""

    def __init__(
        self,
        body: Body,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        stops: Stops,
        rows: int,
        origins: Sequence[tuple[int, int]],
    ) -> None:
        self.body, self.prompts, self.params, self.stops, self.origins = body, prompts, params, stops, origins
        self.fast = body.fast()
        self.logits = logits_of(body.head, body.device) if self.fast is None else self.fast.logits
        self.rows = _Rows(rows, params.max_tokens)
        self.cache = KeyValueCache(rows, params.max_tokens, body.device)
        record = recorder(body.device)
        self.graphed = None if record is None else GraphedStep(body.hidden_of, self.cache, record)

    def admit(self, waiting: deque[tuple[int, range]], free: int) -> None:
        """Compute waiting prompts, each once for all its samples, and draw their first tokens."""
        taken: list[tuple[int, range]] = []
        tokens = 0
        while waiting and len(waiting[0][1]) <= free and (not taken or tokens < PREFILL_TOKENS):
            taken.append(waiting.popleft())
            free -= len(taken[-1][1])
            tokens += len(self.prompts[taken[-1][0]])
        first = len(self.rows)
        owners: list[list[int]] = []
        for i, samples in taken:
            owners.append([len(self.rows) + j for j in range(len(samples))])
            for j in samples:
                drives = uniforms(*self.origins[i], j, self.params.max_tokens)
                self.rows.enter(i, j, len(self.prompts[i]), drives)
        packed = forest([self.prompts[i] for i, _ in taken])
        parts = self.cache.add([len(path) for path in packed.paths], owners)
        blocks = self.cache.blocks[-len(parts) :]
        places = []
        for part, block in zip(parts, blocks, strict=True):
            place = np.zeros((len(part), block.tokens), dtype=np.int64)
            for row, i in zip(place, part, strict=True):
                row[: len(packed.paths[i])] = packed.paths[i]
            places.append(torch.from_numpy(place).to(self.body.device))
        layout = Prefill(forest_layout(packed, self.body.device), blocks, places)
        hidden = self.body.hidden(packed.tokens, packed.positions, layout)
        last = np.repeat([path[-1] for path in packed.paths], [len(samples) for _, samples in taken])
        self._draw(slice(first, len(self.rows)), hidden, torch.from_numpy(last).to(self.body.device))

    def step(self) -> None:
        """One more token for every row."""
        n = len(self.rows)
        own = self.rows.count[:n] - 1
        newest, positions = self.rows.newest, self.rows.prompt_tokens[:n] + own
        if self.graphed is not None and not given_up():
            hidden = self.graphed(newest, positions, own)
        elif self.fast is None:
            row, places = (torch.from_numpy(each).to(self.body.device) for each in (newest, positions))
            hidden = self.body.hidden_of(row, places, Decode.of(self.cache, own))
        else:
            # Rows that are free are computed for nothing.
            more = (0, whole_rows(n) - n)
            newest, positions, own = (np.pad(each, more, mode="edge") for each in (newest, positions, own))
            row, places = torch.from_numpy(newest), torch.from_numpy(positions)
            hidden = self.fast.hidden(row, places, Decode.of(self.cache, own))
        self._draw(slice(0, n), hidden)

    def leave(self) -> list[tuple[int, int, Completion]]:
        """Take out the rows that ended: prompt, sample, completion."""
        rows, gone, ended = self.rows, [], []
        for row in self.stops.candidates(rows.newest, rows.count[: len(rows)], self.params.max_tokens):
            count = rows.count[row]
            tokens = rows.tokens[row, :count].tolist()
            reason = self.stops.reason(tokens, self.params.max_tokens)
            if reason is not None:
                gone.append(row)
                completion = Completion(tuple(tokens), tuple(rows.logprobs[row, :count].tolist()), reason)
                ended.append((int(rows.prompt[row]), int(rows.sample[row]), completion))
        if gone:
            moves = rows.close(gone)
            self.cache.close(gone, moves, int(rows.count[: len(rows)].max(initial=1)) - 1)
        return ended

    def _draw(self, which: slice, hidden: Tensor, last: Tensor | None = None) -> None:
        """Draw the next token of some rows from hidden states, of which `last` says which is each row's."""
        if last is not None:
            # Samples of one prompt have the same logits.
            places, last = torch.unique(last, return_inverse=True)
            hidden = functional.pad(hidden[places], (0, 0, 0, whole_rows(len(places)) - len(places)))
        logits = self.logits(hidden)
        rows, count = np.arange(which.start, which.stop), self.rows.count[which]
        uniform = torch.from_numpy(self.rows.uniform[rows, count]).to(logits.device)
        tokens, logprobs = draw(logits[: len(rows)] if last is None else logits[last], self.params, uniform)
        self.rows.tokens[rows, count] = tokens.cpu().numpy()
        self.rows.logprobs[rows, count] = logprobs.float().cpu().numpy()
        self.rows.count[which] += 1
