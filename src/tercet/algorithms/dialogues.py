"""Answers in the middle of a dialogue that a simulated user carries on: what REFUEL learns from.

Gao et al. 2024 (arXiv:2410.04612): a dialogue is rolled out to a random turn, several answers are drawn there, each is
rolled out to the end, and the answers are compared by what came of them. With one turn it is REBEL.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tercet.algorithms.rollouts import Answer, answer
from tercet.chat.renderers import Renderer
from tercet.engine.base import Sampler
from tercet.types import Conversation, Message, SamplingParams

User = Callable[[Sequence[Conversation], SamplingParams], list[str]]
"""Dialogues that end with the assistant, and how to draw -> what the user says next in each."""

# Every round of sampling has random numbers of its own; the next seed of the caller's lies far below the first round's.
_ROUND = 10**8


@dataclass(frozen=True)
class Branch:
    """Where a dialogue branches, and where it ends, as numbers of the assistant's turns counted from 0."""

    at: int
    end: int


@dataclass(frozen=True)
class Grown:
    """An answer at the branch, and what came after it."""

    answer: Answer
    after: Conversation


def branches(count: int, turns: int, *, seed: int) -> list[Branch]:
    """For each dialogue an end among the first `turns` turns, all as likely, and a branch among those up to it."""
    found = []
    for i in range(count):
        drawn = random.Random(f"{seed} {i}")
        end = drawn.randrange(turns)
        found.append(Branch(drawn.randrange(end + 1), end))
    return found


def branched(
    prompts: Sequence[Conversation],
    where: Sequence[Branch],
    sampler: Sampler,
    renderer: Renderer,
    params: SamplingParams,
    n: int,
    *,
    user: User,
    context_tokens: int,
) -> list[list[Grown]]:
    """Roll every dialogue to its branch, draw `n` answers there, and roll each to the dialogue's end.

    A dialogue that leaves no room for another answer ends before.

    Args:
        prompts: How the dialogues begin, with a turn of the user.
        where: Branch and end of each.
        sampler: The assistant.
        renderer: Conversations to tokens and back.
        params: How answers are drawn; those at the branch exactly as without dialogues.
        n: Answers at the branch.
        user: Speaks in between.
        context_tokens: The longest dialogue that the model takes.
    """
    seeds = itertools.count(params.seed + _ROUND, _ROUND)

    def answered(dialogues: Sequence[Conversation]) -> list[Conversation]:
        groups = answer(dialogues, sampler, renderer, replace(params, seed=next(seeds)), 1)
        return [(*dialogue, group[0].message) for dialogue, group in zip(dialogues, groups, strict=True)]

    def asked(dialogues: Sequence[Conversation]) -> list[Conversation | None]:
        """With what the user says next; None where no answer would fit behind it."""
        said = user(dialogues, replace(params, seed=next(seeds)))
        grown = [(*dialogue, Message("user", words)) for dialogue, words in zip(dialogues, said, strict=True)]
        return [
            each if len(renderer.generation_prompt(each)) + params.max_tokens <= context_tokens else None
            for each in grown
        ]

    trunks, going = list(prompts), list(range(len(prompts)))
    for turn in range(max(each.at for each in where)):
        going = [i for i in going if where[i].at > turn]
        grown = dict(zip(going, asked(answered([trunks[i] for i in going])), strict=True))
        going = [i for i in going if grown[i] is not None]
        for i in going:
            trunks[i] = grown[i] or ()
    groups = answer(trunks, sampler, renderer, params, n)
    tips = [(*trunk, each.message) for trunk, group in zip(trunks, groups, strict=True) for each in group]
    more = [each.end - each.at for each in where for _ in range(n)]
    going = list(range(len(tips)))
    for turn in range(max(more)):
        going = [i for i in going if more[i] > turn]
        grown = dict(zip(going, asked([tips[i] for i in going]), strict=True))
        going = [i for i in going if grown[i] is not None]
        for i, tip in zip(going, answered([grown[i] or () for i in going]), strict=True):
            tips[i] = tip
    ends = iter(tips)
    return [
        [Grown(each, next(ends)[len(trunk) + 1 :]) for each in group]
        for trunk, group in zip(trunks, groups, strict=True)
    ]
