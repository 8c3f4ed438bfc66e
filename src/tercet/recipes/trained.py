"""What was trained before, found again: weights by the folder they lie in, and the model they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tercet.algorithms.preference_model import PreferenceConfig
from tercet.algorithms.reward_model import RewardModelConfig
from tercet.config import from_mapping
from tercet.engine.base import Sampler
from tercet.errors import UsageError
from tercet.recipes.session import MachineConfig, Session, SetupConfig, settings_of
from tercet.rewards.judge import Judge, Verdict
from tercet.rewards.scalar import ScalarJudge
from tercet.runs.checkpoints import final_weights, read_done
from tercet.types import Weights

BASE = "base"
"""The name of the policy that has learned nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(MachineConfig):
    """The model to put trained weights on, and the machine."""

    model: str | None = None
    """The base model; null takes the one that the weights were trained on."""
    engine: Literal["local", "tinker"] | None = None
    """Where weights are: local, or tinker (a service); null takes where they were trained."""
    renderer: str | None = None
    """How conversations become tokens; null takes the way they were written in training."""

    def setup(self, *places: str | None) -> SetupConfig:
        """The settings to open a session with, for weights from these places.

        Raises:
            UsageError: They were trained on different models, or written by different renderers.
        """
        found = {name: _agreed(name, getattr(self, name), places) for name in ("model", "engine", "renderer")}
        known = {name: value for name, value in found.items() if value is not None}
        return from_mapping(SetupConfig, {**settings_of(MachineConfig, self), **known})


def check_same_base(setup: SetupConfig, *places: str | None) -> None:
    """Refuse weights that were trained on another model than the one that is set.

    Raises:
        UsageError: Names the place and both models.
    """
    for place in filter(None, places):
        trained_on = settings_at(place).get("model")
        if trained_on is not None and not _same_model(trained_on, setup.model):
            raise UsageError(
                f"{place} was trained on {trained_on}, and the model is {setup.model}; give --model {trained_on}"
            )


def settings_at(place: str) -> Mapping[str, Any]:
    """The settings of the run that a folder is or belongs to; of a bare adapter, the model it names; else nothing."""
    path = Path(place).resolve()
    for directory in (path, path.parents[1]) if path.parent.name == "checkpoints" else (path,):
        if (directory / "config.yaml").is_file():
            found = yaml.safe_load((directory / "config.yaml").read_text())
            return found if isinstance(found, Mapping) else {}
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        name = json.loads(adapter.read_text()).get("base_model_name_or_path")
        return {"model": name} if name else {}
    return {}


def weights_at(place: str | None, what: str) -> Weights | None:
    """The weights in a run's folder, an adapter's or a model's directory; the newest ones when the run is not finished.

    Args:
        place: A directory; of a whole `tercet rlhf` folder, the RL policy is taken. `base` and None have no weights.
        what: The name of the setting, for the message.

    Raises:
        UsageError: There is no such directory, or it holds no weights.
        CheckpointError: The final checkpoint of a finished run is damaged.
    """
    if place is None or place == BASE:
        return None
    path = Path(place)
    if not path.is_dir():
        raise UsageError(
            f"{what} is {place!r}, which is no directory; give the folder of a run, an adapter's directory, or {BASE}"
        )
    if read_done(path) is not None:
        return final_weights(path)
    from tercet.models.export import find_weights

    return Weights(find_weights(path))


def policy_at(session: Session, place: str | None, what: str = "policy") -> Sampler:
    """The policy with the weights at a place; the base without."""
    found: Sampler = session.engine.sampler(weights_at(place, what))
    return found


def judge_place(place: str) -> str:
    """Where a preference model lies: the folder itself, or that stage of a whole `tercet rlhf` folder."""
    inside = Path(place) / "preference"
    return str(inside) if inside.is_dir() else place


def judge_at(session: Session, place: str, *, verdict: Verdict = "soft", what: str = "judge_model") -> Judge:
    """The preference model of a run, shown comparisons as long as it was trained on."""
    place = judge_place(place)
    limit = settings_at(place).get("max_length") or PreferenceConfig().max_length
    return session.judge(policy_at(session, place, what), limit=int(limit), verdict=verdict)


def either_judge_at(session: Session, place: str, *, what: str) -> Judge | ScalarJudge:
    """A preference model or a scalar reward model, whichever the run at a place has trained."""
    weights = weights_at(judge_place(place), what)
    if weights is None or not session.engine.has_head(weights):
        return judge_at(session, place, what=what)
    limit = settings_at(place).get("max_length") or RewardModelConfig().max_length
    return session.scalar_judge(session.engine.scorer(weights), limit=int(limit))


def _agreed(name: str, asked: str | None, places: Sequence[str | None]) -> str | None:
    if asked is not None:
        return asked
    said = {place: settings_at(place)[name] for place in places if place and name in settings_at(place)}
    first = next(iter(said), None)
    for place, value in said.items():
        if first is not None and not _same_model(value, said[first]):
            raise UsageError(
                f"{first} was trained with {name} {said[first]}, {place} with {value}; they cannot be used together"
            )
    return None if first is None else str(said[first])


def _same_model(a: str, b: str) -> bool:
    # A directory that was moved still has its name.
    return a == b or Path(a).name == Path(b).name
