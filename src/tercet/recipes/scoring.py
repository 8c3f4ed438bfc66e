"""Rewards for a file of answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tercet.config import to_mapping
from tercet.data.groups import Columns, Group, load_groups, rewarded
from tercet.errors import DataError
from tercet.recipes.reward_source import RewardSourceConfig, reward_of, scalar_reward
from tercet.recipes.row_files import check_new, write_rows
from tercet.recipes.rows import rows_sha256
from tercet.recipes.session import Say, Session, open_session
from tercet.recipes.trained import TrainedConfig, judge_place, weights_at
from tercet.rewards.combined import WeightedSum
from tercet.rewards.interface import Candidate, Each, GroupReward

GROUPS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """What gives rewards."""

    reward: RewardSourceConfig = field(default_factory=RewardSourceConfig)
    """What answers are rewarded by; of several sources the weighted sum counts."""
    ensemble: tuple[str, ...] = ()
    """Scalar reward models, whose mean is one source more: folders of runs of tercet reward."""

    def places(self) -> dict[str, str]:
        """Folders of what sits on the base model, by what they are."""
        named = {
            "model": self.reward.model,
            "tournament": self.reward.tournament and judge_place(self.reward.tournament),
        }
        found = {name: place for name, place in named.items() if place is not None}
        return {**found, **{f"ensemble {i + 1}": place for i, place in enumerate(self.ensemble)}}


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(RewardsConfig, TrainedConfig):
    """Give every answer in a file its reward."""

    data: str
    """Answers, as tercet generate writes them, or with the columns prompt, response_0, response_1 and so on."""
    split: str = "train"
    """The split of the data."""
    out: Path
    """A jsonl or parquet file; it must not exist. Stopped, the same command goes on."""
    columns: Columns = "tercet"
    """tercet: prompt and completions; published: prompt, response_0, response_0_reward and so on."""


def score(config: ScoreConfig, *, say: Say = print) -> Path:
    """Write every row again, in order, with a reward for each answer.

    Raises:
        UsageError: The file exists, or nothing gives rewards.
    """
    check_new(config.out)
    check_rewards(config)
    groups = load_groups(config.data, split=config.split)
    places = config.places()
    setup = config.setup(*places.values())
    # What scores by itself asks nothing of a base model, so the smallest one will do.
    session = open_session(setup if places or config.model else replace(setup, model="tiny"), say)
    rewards, hashes = rewards_of(session, config)
    answers = sum(len(group.answers) for group in groups)
    say(f"{', '.join(rewards.sources)} scores {answers:,} answers to {len(groups):,} prompts, into {config.out}")
    return write_scores(groups, rewards, config.out, hashes=hashes, columns=config.columns)


def write_scores(
    groups: Sequence[Group],
    rewards: WeightedSum,
    out: Path,
    *,
    hashes: Mapping[str, object],
    columns: Columns = "tercet",
) -> Path:
    """Score groups into a file; it goes on where it stood.

    Args:
        groups: Answers.
        rewards: What scores them.
        out: A jsonl or parquet file.
        hashes: What the rewards are made of.
        columns: How a row is written.
    """

    def make(at: int, end: int) -> Iterator[dict[str, Any]]:
        part = groups[at:end]
        shown = [
            [Candidate(group.prompt, each.conversation, group.columns) for each in group.answers] for group in part
        ]
        for group, found in zip(part, rewards.group_rewards(shown), strict=True):
            yield rewarded(group, found).row(columns)

    made_of = {**hashes, "answers_sha256": rows_sha256(groups), "columns": columns}
    return write_rows(out, made_of, len(groups), make, verb="score", at_once=GROUPS_AT_ONCE)


def check_rewards(config: RewardsConfig) -> None:
    """Refuse to go on without a reward, before anything is loaded.

    Raises:
        UsageError: None is named.
    """
    if not config.ensemble:
        config.reward.check()


def rewards_of(session: Session, config: RewardsConfig) -> tuple[WeightedSum, dict[str, object]]:
    """The rewards that are named, and what they are made of.

    Raises:
        UsageError: There is none, or one is not there.
    """
    check_rewards(config)
    reward = config.reward
    named = (reward.model, reward.classifier, reward.function, reward.url, reward.tournament)
    found = dict(reward_of(session, reward).sources) if any(named) else {}
    if "tournament" in found:
        source, weight = found["tournament"]
        found["tournament"] = (Meetings(source), weight)
    for i, place in enumerate(config.ensemble):
        found[f"ensemble {i + 1}"] = (Each(scalar_reward(session, place, "ensemble")), 1 / len(config.ensemble))
    hashes = {name: session.fingerprint(weights_at(place, name)) for name, place in config.places().items()}
    # Where weights lie says nothing of them; whatever else is set does.
    rest = replace(reward, model=None, tournament=None)
    return WeightedSum(found), {"reward": to_mapping(rest), "reward_sha256": hashes}


class Meetings:
    """A tournament for groups of whatever sizes."""

    def __init__(self, tournament: GroupReward) -> None:
        self.tournament = tournament

    def group_rewards(self, groups: Sequence[Sequence[Candidate]]) -> list[list[float | None]]:
        """See `GroupReward`.

        Raises:
            DataError: A group has one answer, which meets nobody.
        """
        if any(len(group) < 2 for group in groups):
            raise DataError("a prompt has one answer, and a tournament needs two; generate with --n 2 or more")
        places: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            places.setdefault(len(group), []).append(i)
        found: dict[int, list[float | None]] = {}
        for same in places.values():
            found |= dict(zip(same, self.tournament.group_rewards([groups[i] for i in same]), strict=True))
        return [found[i] for i in range(len(groups))]
