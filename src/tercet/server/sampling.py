"""Requests to sample, drawn together: however many wait for the same weights and settings, the engine is asked once."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

from tercet.engine.base import Sampler
from tercet.errors import TercetError, UsageError
from tercet.server.promises import PROTOBUF, Answer, Promise, failure
from tercet.server.requests import Sample
from tercet.server.wire import sample_response
from tercet.types import SamplingParams, TopLogprobs

LOG = logging.getLogger("tercet.server")
TOP_TOKENS = 1000
ROOM_STEP = 64


@dataclass(frozen=True)
class Draw:
    """One request to sample."""

    promise: Promise
    prompt: tuple[int, ...]
    n: int
    params: SamplingParams
    seed: int
    prompt_from: int | None
    """First token of the prompt whose log-prob is asked for; None asks for none."""
    top_of_prompt: int
    top_of_samples: int


def read_draw(request: Sample, promise: Promise, *, context_tokens: int, vocabulary: int, most_samples: int) -> Draw:
    """A request as the engine will be asked it.

    Args:
        request: As it was sent.
        promise: Its answer to be.
        context_tokens: The longest sequence the model takes.
        vocabulary: How many tokens the model knows.
        most_samples: How many samples one request may ask for.

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
    max_tokens = room if asked.max_tokens is None else asked.max_tokens
    if max_tokens > room:
        # Where the context ends, so does the sample; in steps, so that prompts of several lengths are drawn together.
        max_tokens = room // ROOM_STEP * ROOM_STEP or room
    for name, k in (
        ("topk_prompt_logprobs", request.topk_prompt_logprobs),
        ("topk_sample_logprobs", request.topk_sample_logprobs),
    ):
        if not 0 <= k <= TOP_TOKENS:
            raise UsageError(f"{name} is {k}; it must be from 0 to {TOP_TOKENS}")
    last = request.prompt_logprobs_last_n
    if last is not None and not 1 <= last < max(2, len(prompt)):
        raise UsageError(f"prompt_logprobs_last_n is {last}; it must be from 1 to {len(prompt) - 1}")
    start = 1 if last is None else len(prompt) - last
    stop: tuple[str | int, ...] = (
        () if asked.stop is None else (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    )
    return Draw(
        promise,
        prompt,
        request.num_samples,
        SamplingParams(
            max_tokens=max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(0, asked.top_k),
            stop=stop,
            # An empty list, and nothing else, switches every stop off.
            eos=asked.stop is None or bool(stop),
        ),
        secrets.randbits(62) if asked.seed is None else asked.seed % 2**62,
        start if request.prompt_logprobs or request.topk_prompt_logprobs else None,
        request.topk_prompt_logprobs,
        request.topk_sample_logprobs,
    )


def draw_together(open_sampler: Callable[[], Sampler], draws: Sequence[Draw]) -> list[Answer]:
    """Answer requests that have settings and number of samples in common, in as few calls as there can be.

    If a call fails, each half is tried by itself, so that one bad request spoils no other.
    """
    try:
        return _answers(open_sampler(), draws)
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
    drawn = sampler.sample(prompts, first.params, first.n, seeds=[draw.seed for draw in draws]).result()
    asking = [i for i, draw in enumerate(draws) if draw.prompt_from is not None]
    starts = [draws[i].prompt_from or 1 for i in asking]
    scored = sampler.logprobs([prompts[i] for i in asking], starts).result() if asking else []
    logprobs = {
        i: [nan] * start + row for i, start, row in zip(asking, starts, scored, strict=True)
    }  # fmt: skip
    answers = []
    for i, (draw, completions) in enumerate(zip(draws, drawn, strict=True)):
        top_of_prompt: TopLogprobs | None = None
        if draw.top_of_prompt:
            start = draw.prompt_from or 1
            [found] = sampler.top_logprobs([draw.prompt], draw.top_of_prompt, [start]).result()
            top_of_prompt = [[] for _ in range(start)] + found
        tops = None
        if draw.top_of_samples:
            whole = [[*draw.prompt, *completion.tokens] for completion in completions]
            starts = [len(draw.prompt)] * len(whole)
            tops = sampler.top_logprobs(whole, draw.top_of_samples, starts, draw.params.temperature).result()
        content = sample_response(
            completions, prompt_logprobs=logprobs.get(i), top_of_prompt=top_of_prompt, tops=tops
        )  # fmt: skip
        answers.append(Answer(content, PROTOBUF))
    return answers
