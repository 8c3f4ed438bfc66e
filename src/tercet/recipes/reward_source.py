"""Where the rewards of a run come from, by their settings: one source, or a weighted sum of several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tercet.algorithms.reward_model import RewardModelConfig
from tercet.errors import ConfigError, UsageError
from tercet.recipes.session import Session, device_of
from tercet.recipes.trained import judge_at, settings_at, weights_at
from tercet.rewards.classifier import ClassifierReward, Gives, Reads
from tercet.rewards.combined import WeightedSum
from tercet.rewards.functions import FunctionReward, Shows, load_function
from tercet.rewards.http import HTTPReward
from tercet.rewards.interface import Each, GroupReward
from tercet.rewards.meeting import Tournament
from tercet.rewards.scalar import ScalarJudge, ScalarReward

NORMALISATION_FILE = "normalisation.json"
"""In a reward model's run: mean and standard deviation of its scores of a reference's answers."""


@dataclass(frozen=True, kw_only=True)
class RewardSourceConfig:
    """What answers are rewarded by; at least one source, and their weighted sum when there are several."""

    model: str | None = None
    """A scalar reward model: the folder of a run of tercet reward."""
    classifier: str | None = None
    """A text classifier of transformers: a local directory or a hub id."""
    label: str | None = None
    """Of the classifier: the label whose number is the reward, by name or index; null where there is only one."""
    reads: Reads = "answer"
    """What the classifier is shown: answer, conversation (prompt and answer as text), or chat (its own template)."""
    gives: Gives = "logit"
    """What it gives: logit or probability."""
    function: str | None = None
    """A Python function f(prompts, completions, **columns), as file.py:name or package.module:name."""
    shows: Shows = "messages"
    """What the function is given: messages (role and content) or text."""
    url: str | None = None
    """A server: POST {"prompts": [...], "completions": [...]}, which answers {"rewards": [...]}."""
    timeout_s: float = 60.0
    """How long the server may take for one request."""
    retries: int = 3
    """How often a failed request is made again before the run stops."""
    tournament: str | None = None
    """A pairwise preference model whose tournament ranks a group: the folder of a run of tercet preference."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the sources, by the names model, classifier, function, url, tournament; 1 where none is given."""

    def __post_init__(self) -> None:
        unknown = set(self.weights) - {"model", "classifier", "function", "url", "tournament"}
        if unknown:
            raise ConfigError(
                f"weights names {min(unknown)!r}; sources are model, classifier, function, url, tournament"
            )
        if self.retries < 0 or self.timeout_s <= 0:
            raise ConfigError(
                f"retries is {self.retries} and timeout_s {self.timeout_s}; wanted 0 or above, and above 0"
            )

    def check(self) -> None:
        """Refuse to go on without a reward; before anything is loaded.

        Raises:
            UsageError: No source is named.
        """
        if not any((self.model, self.classifier, self.function, self.url, self.tournament)):
            raise UsageError(
                "there is nothing to learn from: name a reward with --reward.model, --reward.classifier, "
                "--reward.function, --reward.url or --reward.tournament"
            )


def reward_of(session: Session, config: RewardSourceConfig) -> WeightedSum:
    """The sources, loaded.

    Raises:
        UsageError: None is named, or one is not there.
    """
    config.check()
    sources: dict[str, GroupReward] = {}
    if config.model is not None:
        sources["model"] = Each(scalar_reward(session, config.model))
    if config.classifier is not None:
        sources["classifier"] = Each(
            ClassifierReward(
                config.classifier,
                label=config.label,
                reads=config.reads,
                gives=config.gives,
                trust_remote_code=session.setup.trust_remote_code,
                device=device_of(session.setup),
                say=session.say,
            )
        )
    if config.function is not None:
        sources["function"] = Each(FunctionReward(load_function(config.function), shows=config.shows))
    if config.url is not None:
        sources["url"] = Each(HTTPReward(config.url, timeout_s=config.timeout_s, retries=config.retries))
    if config.tournament is not None:
        sources["tournament"] = Tournament(judge_at(session, config.tournament, what="reward.tournament"))
    return WeightedSum({name: (source, config.weights.get(name, 1.0)) for name, source in sources.items()})


def scalar_judge_at(session: Session, place: str, what: str = "reward.model") -> ScalarJudge:
    """The reward model of a run, shown conversations as long as it was trained on.

    Raises:
        UsageError: There is none.
    """
    weights = weights_at(place, what)
    if weights is None:
        raise UsageError(f"{what} is {place!r}, and the base has no head to score with; give a run of tercet reward")
    limit = settings_at(place).get("max_length") or RewardModelConfig().max_length
    return session.scalar_judge(session.engine.scorer(weights), limit=int(limit))


def scalar_reward(session: Session, place: str, what: str = "reward.model") -> ScalarReward:
    """The same as a reward, normalised where that was asked for in training."""
    recorded = Path(place) / NORMALISATION_FILE
    found = json.loads(recorded.read_text()) if recorded.is_file() else {"mean": 0.0, "std": 1.0}
    return ScalarReward(scalar_judge_at(session, place, what), mean=found["mean"], std=found["std"])
