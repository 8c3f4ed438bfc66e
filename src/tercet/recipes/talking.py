"""Several policies in one conversation each, asked the same things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tercet.algorithms.rollouts import answer
from tercet.engine.base import Sampler
from tercet.errors import UsageError
from tercet.recipes.session import Say, Session, open_session
from tercet.recipes.trained import BASE, TrainedConfig, policy_at
from tercet.types import Conversation, Message, SamplingParams

STAGES = ("sft", "rl")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TrainedConfig):
    """Talk to policies side by side."""

    runs: tuple[str, ...] = field(default=("runs/rlhf",), metadata={"positional": True})
    """Folders of runs, or base; the folder of a whole tercet rlhf stands for base, SFT and RL."""
    system: str = ""
    """A system message that begins every conversation; empty has none."""
    max_tokens: int = 200
    """Longest answer in tokens."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that hold this share of the probability."""


@dataclass
class Speaker:
    """A policy and its own conversation."""

    name: str
    sampler: Sampler
    history: Conversation


class Talk:
    """Every speaker answers every line, each in its own conversation."""

    def __init__(self, session: Session, speakers: Sequence[Speaker], config: ChatConfig) -> None:
        self.session, self.speakers, self.config = session, list(speakers), config
        self._opening = tuple(speaker.history for speaker in speakers)
        self._turn = 0

    def ask(self, line: str) -> dict[str, str]:
        """What each speaker answers; the question and its answer join that speaker's history.

        Raises:
            UsageError: A conversation leaves no room for an answer.
        """
        config, renderer = self.config, self.session.renderer
        asked = [(*speaker.history, Message("user", line)) for speaker in self.speakers]
        limit = self.session.engine.context_tokens - config.max_tokens
        for speaker, conversation in zip(self.speakers, asked, strict=True):
            length = len(renderer.generation_prompt(conversation))
            if length > limit:
                raise UsageError(
                    f"the conversation with {speaker.name} has {length} tokens, and beside an answer the model takes "
                    f"{limit}; begin anew with /reset"
                )
        params = SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop=renderer.stop,
            seed=config.seed + self._turn,
        )
        self._turn += 1
        answers = {}
        for speaker, conversation in zip(self.speakers, asked, strict=True):
            [[found]] = answer([conversation], speaker.sampler, renderer, params, 1)
            speaker.history = (*conversation, found.message)
            answers[speaker.name] = found.message.content
        return answers

    def reset(self) -> None:
        """Begin every conversation anew."""
        for speaker, opening in zip(self.speakers, self._opening, strict=True):
            speaker.history = opening


def open_talk(config: ChatConfig, *, say: Say = print) -> Talk:
    """Load the model and every policy on it.

    Raises:
        UsageError: A folder holds no weights, or the policies are of different models.
    """
    places = speakers_of(config.runs)
    session = open_session(config.setup(*places.values()), say)
    opening: Conversation = (Message("system", config.system),) if config.system else ()
    speakers = [Speaker(name, policy_at(session, place, "run"), opening) for name, place in places.items()]
    return Talk(session, speakers, config)


def speakers_of(runs: Sequence[str]) -> dict[str, str]:
    """Name to place of everyone who answers: the stages of a whole `tercet rlhf`, and base before a lone run."""
    found: dict[str, str] = {}
    for run in runs:
        stages = [name for name in STAGES if (Path(run) / name / "checkpoints").is_dir()]
        if stages:
            found |= {BASE: BASE} | {name if len(runs) == 1 else f"{run}/{name}": f"{run}/{name}" for name in stages}
        elif run == BASE or Path(run).is_dir():
            found[run] = run
        else:
            raise UsageError(f"{run!r} is no directory; give the folder of a run, an adapter's directory, or {BASE}")
    return found if len(found) > 1 or BASE in found else {BASE: BASE, **found}
