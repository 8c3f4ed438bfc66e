"""What gives rewards: to answers one by one, or to groups of answers to one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tercet.types import Conversation


@dataclass(frozen=True)
class Candidate:
    """An answer that wants a reward."""

    prompt: Conversation
    answer: Conversation
    columns: Mapping[str, object] = field(default_factory=dict)
    """What else the data say of the prompt."""

    @property
    def text(self) -> str:
        """The answer's words."""
        return "\n\n".join(message.content for message in self.answer)


class AnswerReward(Protocol):
    """Looks at one answer at a time."""

    def rewards(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """A number for each; None where this source has nothing to say.

        Raises:
            RewardError: There is no reward to be had.
        """
        ...


class GroupReward(Protocol):
    """Looks at the answers to one prompt together."""

    def group_rewards(self, groups: Sequence[Sequence[Candidate]]) -> list[list[float | None]]:
        """A number for each answer of each group; None where this source has nothing to say."""
        ...


class Each:
    """A reward of single answers as one of groups."""

    def __init__(self, reward: AnswerReward) -> None:
        self.reward = reward

    def group_rewards(self, groups: Sequence[Sequence[Candidate]]) -> list[list[float | None]]:
        """All answers of all groups, in one call."""
        flat = iter(self.reward.rewards([each for group in groups for each in group]))
        return [[next(flat) for _ in group] for group in groups]
