"""Completions of a model that takes no packed forest: transformers' own decoding, drawn from as everywhere else.

Correct rather than fast: rows that decode side by side have prompts of one length, so that neither padding nor a
neighbour reaches a state or a window; each computes its prompt itself; and a row that has ended waits for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from tercet.engine.draw import draw, uniforms
from tercet.types import Completion, SamplingParams, StopReason


def generate_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    *,
    origins: Sequence[tuple[int, int]],
    ends: Callable[[list[int], int], StopReason | None],
    max_rows: int,
) -> list[list[Completion]]:
    """Draw `n` completions of every prompt.

    Args:
        model: With the sampler's weights.
        prompts: Token ids.
        params: How to draw.
        n: Completions a prompt.
        origins: For each prompt the seed and the number that its draws are a function of.
        ends: Why a completion ends after its last token, or None while it goes on.
        max_rows: Rows decoded side by side.
    """
    # Without what the model's generation config would add: penalties, bans, lengths.
    bare: Any = copy.copy(model)
    config: Any = GenerationConfig
    bare.generation_config = config()
    settings = config(max_new_tokens=params.max_tokens, do_sample=False, use_cache=True)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    waiting = [(i, sample) for i in order for sample in range(n)]
    done: dict[tuple[int, int], Completion] = {}
    with torch.inference_mode():
        while waiting:
            length = len(prompts[waiting[0][0]])
            rows = [row for row in waiting[:max_rows] if len(prompts[row[0]]) == length]
            waiting = waiting[len(rows) :]
            drives = np.stack([uniforms(*origins[i], sample, params.max_tokens) for i, sample in rows])
            drawing = _Drawing(params, drives, ends)
            tokens = torch.tensor([list(prompts[i]) for i, _ in rows], device=model.device)
            bare.generate(
                tokens, attention_mask=torch.ones_like(tokens), generation_config=settings,
                logits_processor=[drawing], stopping_criteria=[_Ended(drawing)],
            )  # fmt: skip
            done.update(zip(rows, drawing.completions(), strict=True))
    return [[done[i, sample] for sample in range(n)] for i in range(len(prompts))]


class _Drawing(LogitsProcessor):
    """Leaves of every row's logits only the token that was drawn, and keeps what was drawn."""

    def __init__(
        self, params: SamplingParams, drives: np.ndarray, ends: Callable[[list[int], int], StopReason | None]
    ) -> None:
        self.params, self.drives, self.ends = params, torch.from_numpy(drives), ends
        self.count = 0
        self.tokens: list[list[int]] = [[] for _ in drives]
        self.logprobs: list[list[float]] = [[] for _ in drives]
        self.reasons: list[StopReason | None] = [None for _ in drives]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = draw(scores, self.params, self.drives[:, self.count].to(scores.device))
        self.count += 1
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.float().tolist(), strict=True)):
            if self.reasons[row] is None:
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                self.reasons[row] = self.ends(self.tokens[row], self.params.max_tokens)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)

    def completions(self) -> list[Completion]:
        """One a row."""
        rows = zip(self.tokens, self.logprobs, self.reasons, strict=True)
        return [Completion(tuple(a), tuple(b), reason) for a, b, reason in rows if reason is not None]


class _Ended(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, drawing: _Drawing) -> None:
        self.drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.tensor([reason is not None for reason in self.drawing.reasons], device=input_ids.device)
