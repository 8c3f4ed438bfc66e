"""Requests to sample, drawn together: however many wait for the same weights and settings, the engine is asked once."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

from tercet.engine.base import Sampler
from tercet.errors import TercetError, UsageError
from tercet.server.promises import PROTOBUF, Answer, Promise, failure
from tercet.server.requests import Sample
from tercet.server.wire import sample_response, top_message
from tercet.types import Completion, SamplingParams

LOG = logging.getLogger("tercet.server")
TOP_TOKENS = 1000
ROOM_STEP = 64
# Entries of tables of likeliest tokens in one call: they are Python numbers until they are bytes.
TOP_ENTRIES = 1_000_000


@dataclass(frozen=True)
class Draw:
    """One request to sample."""

    promise: Promise
    prompt: tuple[int, ...]
    n: int
    params: SamplingParams
    seed: int
    limit: int
    """Most tokens of a sample. `params`, which requests that are drawn together have in common, may name fewer."""
    prompt_from: int | None
    """First token of the prompt whose log-prob is asked for; None asks for none."""
    top_of_prompt: int
    top_of_samples: int

    @property
    def bytes(self) -> int:
        """What it takes: the prompt, a Python number a token, and the tables of likeliest tokens that it asks for."""
        entries = self.top_of_prompt * len(self.prompt) + self.top_of_samples * self.n * self.limit
        return 36 * len(self.prompt) + 8 * entries


def read_draw(
    request: Sample, promise: Promise, *, context_tokens: int, vocabulary: int, most_samples: int, most_tokens: int
) -> Draw:
    """A request as the engine will be asked it.

    Args:
        request: As it was sent.
        promise: Its answer to be.
        context_tokens: The longest sequence the model takes.
        vocabulary: How many tokens the model knows.
        most_samples: How many samples one request may ask for.
        most_tokens: How many tokens one may ask for, those of tables of likeliest tokens among them.

    Raises:
        UsageError: It cannot be carried out; the message says why.
    """
    asked, prompt = request.sampling_params, request.prompt.tokens()
    for name, given in (
        ("target_prompt_logprobs", request.target_prompt_logprobs),
        ("prompt_alt_tokens_k", request.prompt_alt_tokens_k),
    ):
        if given:
            raise UsageError(f"{name} is not offered by this server; topk_prompt_logprobs is")
    if not 1 <= request.num_samples <= most_samples:
        raise UsageError(f"num_samples is {request.num_samples}; it must be from 1 to {most_samples}")
    wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UsageError(f"the prompt has the token {wrong}; the model knows 0 to {vocabulary - 1}")
    room = context_tokens - len(prompt)
    if not prompt or room < 1:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; it must have from 1 to {context_tokens - 1}, as the model takes "
            f"{context_tokens} and an answer has at least one"
        )
    limit = room if asked.max_tokens is None else asked.max_tokens
    if limit > room:
        # Where the context ends, so does the sample; in steps, so that prompts of several lengths are drawn together.
        limit = room // ROOM_STEP * ROOM_STEP or room
    for name, k in (
        ("topk_prompt_logprobs", request.topk_prompt_logprobs),
        ("topk_sample_logprobs", request.topk_sample_logprobs),
    ):
        if not 0 <= k <= TOP_TOKENS:
            raise UsageError(f"{name} is {k}; it must be from 0 to {TOP_TOKENS}")
    asked_for = request.num_samples * limit * (1 + request.topk_sample_logprobs)
    asked_for += len(prompt) * request.topk_prompt_logprobs
    if asked_for > most_tokens:
        raise UsageError(
            f"the request is for {asked_for} tokens ({request.num_samples} samples of {limit}, the "
            f"{request.topk_sample_logprobs} likeliest beside each, and {request.topk_prompt_logprobs} at each of the "
            f"prompt's {len(prompt)}), and {most_tokens} are allowed; ask for fewer at once, or start the server with "
            "a larger --limits.sample-tokens"
        )
    last = request.prompt_logprobs_last_n
    if last is not None and not 1 <= last < max(2, len(prompt)):
        raise UsageError(f"prompt_logprobs_last_n is {last}; it must be from 1 to {len(prompt) - 1}")
    start = 1 if last is None else len(prompt) - last
    stop: tuple[str | int, ...] = (
        () if asked.stop is None else (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    )
    # An empty list, and nothing else, switches every stop off.
    eos = asked.stop is None or bool(stop)
    return Draw(
        promise,
        prompt,
        request.num_samples,
        SamplingParams(
            max_tokens=_shared(room) if asked.max_tokens is None and eos else limit,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(0, asked.top_k),
            stop=stop,
            eos=eos,
        ),
        secrets.randbits(62) if asked.seed is None else asked.seed % 2**62,
        limit,
        start if request.prompt_logprobs or request.topk_prompt_logprobs else None,
        request.topk_prompt_logprobs,
        request.topk_sample_logprobs,
    )


def _shared(room: int) -> int:
    # Samples without a limit seldom come near the end of the context. They are drawn as far as prompts of many other
    # lengths leave room, four limits to every doubling, and again to their own end where they come so far.
    step = 1 << max(0, room.bit_length() - 3)
    return room // step * step


class Unwanted(Exception):
    """Nobody waits for any of the answers."""


class _Prompts(Sequence[Any]):
    """The prompts of requests, for as long as one of them is waited for.

    An engine reads a prompt when there is room for its next samples: a call of hours ends there.
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        self.draws, self.unwanted = draws, 0

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, i: Any) -> Any:
        while self.unwanted < len(self.draws):
            if not self.draws[self.unwanted].promise.done.is_set():
                return self.draws[i].prompt
            self.unwanted += 1
        raise Unwanted


def draw_together(open_sampler: Callable[[], Sampler], draws: Sequence[Draw]) -> list[Answer]:
    """Answer requests that have settings and number of samples in common, in as few calls as there can be.

    If a call fails, each half is tried by itself, so that one bad request spoils no other.
    """
    try:
        return _answers(open_sampler(), draws)
    except Unwanted:
        return [failure("nobody waits for the sample any more")] * len(draws)
    except Exception as error:
        if len(draws) > 1:
            half = len(draws) // 2
            return [*draw_together(open_sampler, draws[:half]), *draw_together(open_sampler, draws[half:])]
        return [failed(error)]


def failed(error: Exception) -> Answer:
    """How a client learns of an error: ours says what to do, another one is ours to mend."""
    if isinstance(error, TercetError):
        return failure(str(error))
    LOG.error("a request failed", exc_info=error)
    return failure(f"the server failed: {type(error).__name__}: {error}; its log has more", "server")


def _answers(sampler: Sampler, draws: Sequence[Draw]) -> list[Answer]:
    first = draws[0]
    prompts = [draw.prompt for draw in draws]
    drawn = _drawn(sampler, draws)
    asking = [i for i, draw in enumerate(draws) if draw.prompt_from is not None]
    starts = [draws[i].prompt_from or 1 for i in asking]
    scored = sampler.logprobs([prompts[i] for i in asking], starts).result() if asking else []
    logprobs = {
        i: [nan] * start + row for i, start, row in zip(asking, starts, scored, strict=True)
    }  # fmt: skip
    tables: dict[tuple[int, int], _Table] = {}
    for i, (draw, completions) in enumerate(zip(draws, drawn, strict=True)):
        if draw.top_of_prompt:
            start = draw.prompt_from or 1
            tables[i, 0] = _Table(draw.prompt, start, draw.top_of_prompt, 1.0, blank=start)
        if draw.top_of_samples:
            for k, each in enumerate(completions, start=1):
                whole = (*draw.prompt, *each.tokens)
                tables[i, k] = _Table(whole, len(draw.prompt), draw.top_of_samples, first.params.temperature)
    told = _likeliest(sampler, tables)
    answers = []
    for i, completions in enumerate(drawn):
        content = sample_response(
            completions,
            prompt_logprobs=logprobs.get(i),
            top_of_prompt=told.get((i, 0)),
            tops=[told.get((i, k)) for k in range(1, len(completions) + 1)],
        )
        answers.append(Answer(content, PROTOBUF))
    return answers


def _drawn(sampler: Sampler, draws: Sequence[Draw]) -> list[list[Completion]]:
    def ask(places: Sequence[int], params: SamplingParams) -> list[list[Completion]]:
        asked = [draws[i] for i in places]
        seeds = [draw.seed for draw in asked]
        return sampler.sample(_Prompts(asked), params, draws[0].n, seeds=seeds).result()

    params = draws[0].params
    found = ask(range(len(draws)), params)
    further: dict[int, list[int]] = {}
    for i, (draw, completions) in enumerate(zip(draws, found, strict=True)):
        if draw.limit > params.max_tokens and any(each.stop_reason == "length" for each in completions):
            further.setdefault(draw.limit, []).append(i)
    for limit, places in further.items():
        # From the beginning: a seed decides every token, so they come that far again and then go on.
        for i, completions in zip(places, ask(places, replace(params, max_tokens=limit)), strict=True):
            found[i] = completions
    return found


@dataclass(frozen=True)
class _Table:
    """The `k` likeliest tokens at every place of a sequence from `start` on."""

    tokens: tuple[int, ...]
    start: int
    k: int
    temperature: float
    blank: int = 0
    """Empty places before those, as an answer has them."""

    @property
    def entries(self) -> int:
        return self.k * (len(self.tokens) - self.start)


def _likeliest(sampler: Sampler, tables: Mapping[tuple[int, int], _Table]) -> dict[tuple[int, int], Any]:
    """The tables as messages: a call for all that have `k` and temperature in common, several where they are large."""
    alike: dict[tuple[int, float], list[tuple[int, int]]] = {}
    for place, table in tables.items():
        alike.setdefault((table.k, table.temperature), []).append(place)
    found: dict[tuple[int, int], Any] = {}
    for (k, temperature), places in alike.items():
        calls: list[list[tuple[int, int]]] = []
        room = 0
        for place in places:
            room -= tables[place].entries
            if room < 0 or not calls:
                calls.append([])
                room = TOP_ENTRIES - tables[place].entries
            calls[-1].append(place)
        for call in calls:
            asked = [tables[place] for place in call]
            sequences, starts = [table.tokens for table in asked], [table.start for table in asked]
            tops = sampler.top_logprobs(sequences, k, starts, temperature).result()
            for place, table, top in zip(call, asked, tops, strict=True):
                found[place] = top_message([[] for _ in range(table.blank)] + top)
    return found
