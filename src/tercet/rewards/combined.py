"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tercet.errors import RewardError, UsageError
from tercet.rewards.interface import Candidate, GroupReward


class WeightedSum:
    """The sum of weight x reward over the sources that have something to say of an answer."""

    def __init__(self, sources: Mapping[str, tuple[GroupReward, float]]) -> None:
        """Take sources with their weights, by names.

        Raises:
            UsageError: There is none: nothing stands in for a missing reward.
        """
        if not sources:
            raise UsageError(
                "there is no reward to learn from; name a reward model, a classifier, a function or a server"
            )
        self.sources = dict(sources)

    def group_rewards(self, groups: Sequence[Sequence[Candidate]]) -> list[list[float]]:
        """A number for each answer of each group.

        Raises:
            RewardError: No source has anything to say of an answer.
        """
        said = {name: source.group_rewards(groups) for name, (source, _) in self.sources.items()}
        return [
            [self._sum({name: said[name][g][i] for name in said}, group[i]) for i in range(len(group))]
            for g, group in enumerate(groups)
        ]

    def _sum(self, found: Mapping[str, float | None], candidate: Candidate) -> float:
        terms = [self.sources[name][1] * value for name, value in found.items() if value is not None]
        if not terms:
            raise RewardError(
                f"no reward ({', '.join(found)}) applies to the answer {candidate.text[:60]!r}; add one that does"
            )
        return sum(terms)
