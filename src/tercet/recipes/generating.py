"""Answers to a file of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet import data
from tercet.algorithms.rollouts import Answer, answer
from tercet.errors import DataError, UsageError
from tercet.recipes.session import Say, Session, check_positive, open_session
from tercet.recipes.trained import BASE, TrainedConfig, policy_at
from tercet.runs.durable import sync
from tercet.runs.progress import ProgressDisplay
from tercet.runs.rows import append_rows
from tercet.types import Conversation, SamplingParams

# Answers are a function of (seed, place of the prompt): the size of a batch must not be a setting.
PROMPTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(TrainedConfig):
    """Answer prompts from a file into a jsonl file."""

    policy: str = BASE
    """The policy: the folder of a run, an adapter's directory, or base."""
    data: str = "builtin"
    """Prompts: those of conversations or comparisons, from builtin, the hub, or files."""
    split: str = "train"
    """The split of the data."""
    rows: int | None = None
    """Prompts, at most, from the beginning; null takes all."""
    out: Path
    """A jsonl file; it must not exist."""
    n: int = 1
    """Answers per prompt."""
    max_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 from all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and prompts too long for the model, and count them."""


def generate(config: GenerateConfig, *, say: Say = print) -> Path:
    """Write one row per prompt: `prompt`, and `completions` with text, tokens, logprobs and stop_reason.

    Rows are added to `OUT.part` as they come, which becomes `OUT` when all are there.

    Raises:
        UsageError: The file exists.
    """
    if config.out.exists():
        raise UsageError(f"{config.out} exists, and nothing is overwritten; name another file with --out")
    check_positive({"n": config.n, "rows": 1 if config.rows is None else config.rows})
    params = _params(config, (), 0)
    session = open_session(config.setup(config.policy), say)
    prompts = _prompts(session, config, params.max_tokens)
    sampler = policy_at(session, config.policy)
    say(f"{config.policy} answers {len(prompts):,} prompts, {config.n} times each, into {config.out}")
    part = config.out.with_name(f"{config.out.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    with ProgressDisplay("generate", total_steps=len(prompts), shown={"tokens": "tokens/answer"}) as progress:
        for at in range(0, len(prompts), PROMPTS_AT_ONCE):
            params = _params(config, session.renderer.stop, at)
            groups = answer(prompts[at : at + PROMPTS_AT_ONCE], sampler, session.renderer, params, config.n)
            append_rows(part, _rows(groups))
            lengths = [len(each.completion.tokens) for group in groups for each in group]
            progress.update(at + len(groups) - 1, {"tokens": sum(lengths) / len(lengths)})
    sync(part)
    part.rename(config.out)
    sync(config.out.parent)
    return config.out


def _params(config: GenerateConfig, stop: tuple[str | int, ...], at: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=stop,
        seed=config.seed + at,
    )


def _prompts(session: Session, config: GenerateConfig, max_tokens: int) -> list[Conversation]:
    skip = config.skip_bad_rows
    loaded = data.load_prompts(config.data, split=config.split, skip_bad_rows=skip, max_rows=config.rows)
    session.say(loaded.describe())
    limit = session.engine.context_tokens - max_tokens
    lengths = [len(session.renderer.generation_prompt(prompt)) for prompt in loaded.rows]
    long = [i for i, length in enumerate(lengths) if length > limit]
    if long and not skip:
        raise DataError(
            f"{config.data}: prompt {long[0] + 1} has {lengths[long[0]]} tokens, and beside an answer of {max_tokens} "
            f"the model takes {limit}; shorten it, lower max_tokens, or pass --skip-bad-rows to leave such prompts out"
        )
    if long:
        session.say(f"{len(long)} of {len(lengths)} prompts have more than {limit} tokens and are left out")
    kept = [prompt for prompt, length in zip(loaded.rows, lengths, strict=True) if length <= limit]
    if not kept:
        raise DataError(f"every prompt of {config.data} has more than {limit} tokens")
    return kept


def _rows(groups: list[list[Answer]]) -> Iterator[dict[str, Any]]:
    for group in groups:
        yield {
            "prompt": [{"role": m.role, "content": m.content} for m in group[0].prompt],
            "completions": [
                {
                    "text": each.message.content,
                    "tokens": list(each.completion.tokens),
                    "logprobs": list(each.completion.logprobs),
                    "stop_reason": each.completion.stop_reason,
                }
                for each in group
            ],
        }
