"""From scored answers to pairs: what is left out and why, which answers meet, what is held out. Pure."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tercet.data import hold_out
from tercet.data.groups import Group, RankedPair, Sampled
from tercet.data.turns import opening
from tercet.errors import ConfigError, DataError
from tercet.types import Conversation

Select = Literal["best_worst", "all_pairs", "top_k", "best"]
Tokenised = Callable[[Conversation, str], tuple[tuple[int, ...], tuple[int, ...]]]
"""Prompt and answer -> their token ids; asked only where one of them comes without."""
DRAWN_AT = "sampling_temperature"
"""Column of a group's row: at which temperature its answers were drawn."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What becomes of scored answers."""

    max_prompt_length: int = 1024
    """Longest prompt in tokens, the header of the answer included; longer ones are left out and counted."""
    max_answer_length: int = 2048
    """Longest answer in tokens, its end included; longer ones are left out and counted."""
    drop_unfinished: bool = True
    """Leave out answers that were cut off at max_tokens."""
    select: Select = "best_worst"
    """best_worst: the best answer against the worst; all_pairs; top_k: the k best against the k worst, in order; best:
    no pairs but the best answers themselves, to fine-tune on (rejection sampling)."""
    top_k: int = 1
    """Of top_k and best: how many, equal answers counted once."""
    test_rows: int = 100
    """Prompts held out, at most a tenth."""

    def __post_init__(self) -> None:
        if min(self.max_prompt_length, self.max_answer_length, self.top_k) < 1:
            raise ConfigError("max_prompt_length, max_answer_length and top_k must be at least 1")
        if self.test_rows < 0:
            raise ConfigError(f"test_rows is {self.test_rows}; it must be 0 or above")


@dataclass(frozen=True)
class Prepared:
    """Pairs to learn and held out, and how many of what was left out."""

    train: list[RankedPair]
    test: list[RankedPair]
    dropped: dict[str, int]
    temperatures: tuple[float, ...] = ()
    """At which the answers were drawn, as far as their rows say."""

    def describe(self) -> list[str]:
        """One line for each filter, and one for what is left."""
        lines = [f"left out: {count:,} {reason}" for reason, count in self.dropped.items()]
        return [*lines, f"kept: {len(self.train):,} to learn, {len(self.test):,} held out"]


def prepare(config: SelectionConfig, groups: Sequence[Group], tokenised: Tokenised, *, seed: int) -> Prepared:
    """Filter answers, pair them, hold prompts out.

    With `select="best"` the chosen answer of every pair is what is learned, and the rejected one is the same.

    Raises:
        DataError: An answer has no reward, or nothing is left.
    """
    dropped: Counter[str] = Counter()
    # By what their prompts begin with: dialogues that go on from there are on one side.
    kept: dict[Conversation, list[RankedPair]] = {}
    for place, group in enumerate(groups, start=1):
        if any(each.reward is None for each in group.answers):
            raise DataError(f"group {place} has an answer without a reward; run tercet score on the file first")
        usable = _usable(config, group, tokenised, dropped)
        if usable is None:
            continue
        pairs = _pairs(config, usable)
        different = [pair for pair in pairs if config.select == "best" or not _same(pair.chosen, pair.rejected)]
        dropped["pairs of equal answers"] += len(pairs) - len(different)
        if different:
            kept.setdefault(opening(group.prompt), []).extend(different)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise DataError(f"of {len(groups)} groups nothing is left to learn: {reasons or 'there was none'}")
    prompts = list(kept.values())
    train, test = hold_out(prompts, count=min(config.test_rows, len(prompts) // 10), seed=seed)
    drawn = [group.columns.get(DRAWN_AT) for group in groups]
    return Prepared(
        list(itertools.chain.from_iterable(train)),
        list(itertools.chain.from_iterable(test)),
        {reason: count for reason, count in dropped.items() if count},
        tuple(sorted({float(each) for each in drawn if isinstance(each, int | float)})),
    )


def _usable(config: SelectionConfig, group: Group, tokenised: Tokenised, dropped: Counter[str]) -> Group | None:
    """The group with what may be learned, tokens and all; None where that is too little."""
    prompt_tokens, answers = group.prompt_tokens, []
    for each in group.answers:
        if each.tokens is None or prompt_tokens is None:
            asked, tokens = tokenised(group.prompt, each.text)
            prompt_tokens = asked if prompt_tokens is None else prompt_tokens
            each = replace(each, tokens=tokens) if each.tokens is None else each
        answers.append(each)
    assert prompt_tokens is not None
    if len(prompt_tokens) > config.max_prompt_length:
        dropped[f"prompts of more than {config.max_prompt_length} tokens"] += 1
        return None
    left: list[Sampled] = []
    for each in answers:
        assert each.tokens is not None and each.reward is not None
        if len(each.tokens) > config.max_answer_length:
            dropped[f"answers of more than {config.max_answer_length} tokens"] += 1
        elif config.drop_unfinished and each.stop_reason == "length":
            dropped["answers that were cut off"] += 1
        elif not math.isfinite(each.reward):
            dropped["answers whose reward is no number"] += 1
        else:
            left.append(each)
    if config.select in ("best", "top_k"):
        different = [each for i, each in enumerate(left) if not any(_same(each, other) for other in left[:i])]
        dropped["answers equal to another one of their prompt"] += len(left) - len(different)
        left = different
    if len(left) < (1 if config.select == "best" else 2):
        dropped["prompts with too few answers left"] += 1
        return None
    return replace(group, answers=tuple(left), prompt_tokens=prompt_tokens)


def _pairs(config: SelectionConfig, group: Group) -> list[RankedPair]:
    def pair(chosen: Sampled, rejected: Sampled) -> RankedPair:
        return RankedPair(group.prompt, chosen, rejected, group.prompt_tokens)

    # Sorting is stable, so that of equal rewards the first counts as the best, and the first as the worst.
    best = sorted(group.answers, key=lambda each: -_reward(each))
    worst = sorted(group.answers, key=_reward)
    if config.select == "best":
        return [pair(each, each) for each in best[: config.top_k]]
    if config.select == "all_pairs":
        both = itertools.combinations(group.answers, 2)
        return [pair(a, b) if _reward(a) >= _reward(b) else pair(b, a) for a, b in both]
    count = 1 if config.select == "best_worst" else min(config.top_k, len(best) // 2)
    return [pair(best[i], worst[i]) for i in range(count)]


def _reward(answer: Sampled) -> float:
    assert answer.reward is not None
    return answer.reward


def _same(a: Sampled, b: Sampled) -> bool:
    return a.text.strip() == b.text.strip() or a.tokens == b.tokens
