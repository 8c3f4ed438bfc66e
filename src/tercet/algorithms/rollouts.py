"""Prompts in, judged groups of answers out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tercet.algorithms.steps import OptimConfig
from tercet.chat.renderers import Renderer, Termination
from tercet.engine.base import Sampler
from tercet.errors import ConfigError
from tercet.rewards.interface import Candidate
from tercet.rewards.judge import Compares
from tercet.rewards.meeting import Tournament
from tercet.rewards.tournament import Pattern, flip_rate, scores
from tercet.types import Completion, Conversation, Datum, Message, SamplingParams


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(OptimConfig):
    """How a policy answers the prompts that it learns from."""

    data: str = "builtin"
    """Prompts: those of conversations or comparisons, from builtin, the hub, or files."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones are left out and counted."""
    steps: int = 12
    """Rounds of sampling and learning."""
    prompts_per_step: int = 5
    """Prompts answered per step."""
    group_size: int = 4
    """Answers per prompt."""
    max_tokens: int = 48
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same one."""
    eval_every_steps: int = 12
    """Steps between evaluations; 0 evaluates only at the end."""
    save_every_steps: int = 5
    """Steps between checkpoints; 0 saves only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; exploring needs it above 0 (1.0 is usual)")

    @property
    def completions_per_step(self) -> int:
        """Answers sampled per step."""
        return self.prompts_per_step * self.group_size

    def sampling(self, renderer: Renderer, seed: int) -> SamplingParams:
        """How answers are drawn."""
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, stop=renderer.stop, seed=seed)


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


def candidates(
    groups: Sequence[Sequence[Answer]], columns: Mapping[Conversation, Mapping[str, object]] | None = None
) -> list[list[Candidate]]:
    """Answers as a reward is shown them, with what the data say of their prompts."""
    told = columns or {}
    return [[Candidate(each.prompt, each.conversation, told.get(each.prompt, {})) for each in g] for g in groups]


def tournament_rewards(
    groups: Sequence[Sequence[Answer]], judge: Compares, *, pattern: Pattern, chunk: int | None, format_penalty: float
) -> tuple[list[list[float]], dict[str, float]]:
    """Rewards of groups of one size, and what was seen of the judge; all matches are one call to it.

    Args:
        groups: Answers to each prompt.
        judge: Decides.
        pattern: See `matches`.
        chunk: See `matches`.
        format_penalty: Taken off the mean margin of an answer that did not end with its stop.
    """
    margins = Tournament(judge, pattern=pattern, chunk=chunk).margins(candidates(groups))
    won = [scores(len(group), each) for group, each in zip(groups, margins, strict=True)]
    rewards = [
        [score - format_penalty * (each.termination != "stop") for score, each in zip(row, group, strict=True)]
        for row, group in zip(won, groups, strict=True)
    ]
    answers = [each for group in groups for each in group]
    flips = statistics.fmean(flip_rate(each) for each in margins)
    return rewards, {
        "win_minus_loss": statistics.fmean(abs(score) for row in won for score in row),
        "format": statistics.fmean(each.termination == "stop" for each in answers),
        **({"judge/flip_rate": flips} if pattern == "both_ways" else {}),
    }


def log_ratios(groups: Sequence[Sequence[Answer]], reference: Sampler, temperature: float) -> list[list[list[float]]]:
    """For every token of every answer, how much likelier the policy finds it than the reference does, in nats.

    Its sum over an answer estimates the KL divergence of the policy from the reference (the estimator k1).
    """
    answers = [each for group in groups for each in group]
    sequences = [[*each.prompt_tokens, *each.completion.tokens] for each in answers]
    starts = [len(each.prompt_tokens) for each in answers]
    theirs = reference.logprobs(sequences, starts, temperature).result()
    flat = iter(
        [p - q for p, q in zip(each.completion.logprobs, row, strict=True)]
        for each, row in zip(answers, theirs, strict=True)
    )
    return [[next(flat) for _ in group] for group in groups]
