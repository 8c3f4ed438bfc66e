"""Prompts in, judged groups of answers out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.chat.renderers import Renderer, Termination
from tercet.engine.base import Sampler
from tercet.types import Completion, Conversation, Datum, Message, SamplingParams


@dataclass(frozen=True)
class Answer:
    """One sampled answer to a prompt: its tokens, and what they say."""

    prompt: Conversation
    prompt_tokens: tuple[int, ...]
    completion: Completion
    message: Message
    termination: Termination

    @property
    def conversation(self) -> Conversation:
        """The answer as a judge is shown it."""
        return (self.message,)

    def datum(self, **streams: float | Sequence[float]) -> Datum:
        """Prompt and answer as one sequence; weights are 1 on the answer, stop included.

        Args:
            streams: For each stream a number for every token of the answer, or one number for all of them.
        """
        before, n = len(self.prompt_tokens), len(self.completion.tokens)
        values = {k: [v] * n if isinstance(v, int | float) else list(v) for k, v in streams.items()}
        return Datum(
            (*self.prompt_tokens, *self.completion.tokens),
            [0.0] * before + [1.0] * n,
            {name: [0.0] * before + row for name, row in values.items()},
        )


def answer(
    prompts: Sequence[Conversation], sampler: Sampler, renderer: Renderer, params: SamplingParams, n: int
) -> list[list[Answer]]:
    """Sample `n` answers to every prompt."""
    tokens = [renderer.generation_prompt(prompt) for prompt in prompts]
    groups = sampler.sample(tokens, params, n).result()
    return [
        [Answer(prompt, tuple(ids), completion, *renderer.parse(completion.tokens)) for completion in group]
        for prompt, ids, group in zip(prompts, tokens, groups, strict=True)
    ]


def length_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """How long the answers are, in tokens, and how many were cut off."""
    lengths = [len(each.completion.tokens) for each in answers]
    ended = [len(each.completion.tokens) for each in answers if each.completion.stop_reason != "length"]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": statistics.fmean(ended) if ended else 0.0,
    }
