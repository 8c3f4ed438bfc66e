"""A policy of one letter per answer: a bandit with the tokenizer and the chat format of the model `tiny`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.chat.renderers import Renderer, renderer
from tercet.engine.fake import FakeEngine
from tercet.models.load import load_tokenizer
from tercet.runs.run import Run
from tercet.types import Message

ARMS = "wxyz"
PROMPTS = [(Message("user", f"{number}?"),) for number in range(6)]


@dataclass(frozen=True)
class Bandit:
    """After the prompt's last token comes one of the arms, then the stop."""

    engine: FakeEngine
    renderer: Renderer
    last: int
    arms: tuple[int, ...]

    def probabilities(self, sampler: Any) -> torch.Tensor:
        """What a policy gives the arms."""
        prompt = self.renderer.generation_prompt(PROMPTS[0])
        rows = sampler.logprobs([[*prompt, arm] for arm in self.arms], [len(prompt)] * len(self.arms)).result()
        return torch.tensor([row[0] for row in rows]).exp()


@pytest.fixture
def bandit() -> Callable[..., Bandit]:
    """Make one; `start` is what the base gives the arms."""

    def make(start: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)) -> Bandit:
        tokenizer = load_tokenizer("tiny")
        chat = renderer("chat_template", tokenizer)
        last = chat.generation_prompt(PROMPTS[0])[-1]
        arms = tuple(tokenizer.convert_tokens_to_ids(list(ARMS)))
        logits = torch.full((len(tokenizer), len(tokenizer)), -30.0)
        for arm, probability in zip(arms, start, strict=True):
            logits[last, arm] = torch.log(torch.tensor(probability))
            logits[arm, tokenizer.convert_tokens_to_ids("<|im_end|>")] = 30.0
        return Bandit(FakeEngine(vocabulary=len(tokenizer), logits=logits, context_tokens=512), chat, last, arms)

    return make


class Died(Exception):
    """What a run that is killed in a test raises."""


class Mortal(Run):
    """A run whose process dies when it would log a step."""

    dies_at: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.dies_at:
            raise Died
        super().log(step, metrics)


@pytest.fixture
def open_run() -> Callable[..., Mortal]:
    """Open a run folder; `dies_at` is the step it does not live to log."""

    def make(directory: Path, *, steps: int, save_every_steps: int = 2, dies_at: int | None = None) -> Mortal:
        run = Mortal(
            directory, config={"seed": 0}, save_every_steps=save_every_steps, total_steps=steps, stage="rl", loggers=()
        )
        run.dies_at = dies_at
        return run

    return make


@pytest.fixture
def died() -> type[Died]:
    return Died
