"""A tournament as a reward of groups: answers to one prompt meet under a judge."""

from __future__ import annotations

from collections.abc import Sequence

from tercet.rewards.interface import Candidate
from tercet.rewards.judge import Compares
from tercet.rewards.tournament import Match, Pattern, matches, scores
from tercet.types import Comparison


class Tournament:
    """The mean margin of each answer over its matches, in [-1, 1]."""

    def __init__(self, judge: Compares, *, pattern: Pattern = "both_ways", chunk: int | None = None) -> None:
        """Take a judge, and say which matches are played; see `matches`."""
        self.judge, self.pattern, self.chunk = judge, pattern, chunk

    def margins(self, groups: Sequence[Sequence[Candidate]]) -> list[dict[Match, float]]:
        """What the judge says of every match of groups of one size, in one call to it."""
        played = matches(len(groups[0]), pattern=self.pattern, chunk=self.chunk)
        shown = [Comparison(group[i].prompt, group[i].answer, group[j].answer) for group in groups for i, j in played]
        flat = iter(self.judge.margins(shown))
        return [{match: next(flat) for match in played} for _ in groups]

    def group_rewards(self, groups: Sequence[Sequence[Candidate]]) -> list[list[float | None]]:
        """See `GroupReward`."""
        return [list(scores(len(group), each)) for group, each in zip(groups, self.margins(groups), strict=True)]
