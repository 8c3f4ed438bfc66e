"""A pairwise preference model as a judge: two answers in, how much the second is preferred out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tercet.chat.comparisons import ComparisonRenderer
from tercet.engine.base import Sampler
from tercet.errors import TrainingError
from tercet.types import Comparison, SamplingParams

Verdict = Literal["soft", "hard"]


@dataclass(frozen=True)
class LabelProbabilities:
    """What the judge gives the two labels; the rest of 1 is on other tokens."""

    a: float
    b: float

    @property
    def margin(self) -> float:
        """P(B) - P(A), in [-1, 1]: above 0 when the answer shown second is better."""
        return self.b - self.a

    @property
    def a_share(self) -> float:
        """P(A) among the two labels; 0.5 where both are too small for a number."""
        return self.a / (self.a + self.b) if self.a + self.b > 0 else 0.5


class Compares(Protocol):
    """Whatever tells which of two answers is better."""

    def margins(self, comparisons: Sequence[Comparison]) -> list[float]:
        """How much the answer shown second is preferred, in [-1, 1]."""
        ...

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[LabelProbabilities]:
        """The probabilities of both labels, each comparison as it is shown."""
        ...


class Judge:
    """Reads the label probabilities of a preference model in one forward pass.

    With `verdict="hard"` it asks for one greedy token instead, as the published recipe does: A is -1, B is +1, Tie and
    anything else 0.
    """

    def __init__(self, sampler: Sampler, renderer: ComparisonRenderer, *, verdict: Verdict = "soft") -> None:
        self.sampler, self.renderer, self.verdict = sampler, renderer, verdict

    def margins(self, comparisons: Sequence[Comparison]) -> list[float]:
        """How much the answer shown second is preferred, in [-1, 1]."""
        if self.verdict == "soft":
            return [probabilities.margin for probabilities in self.probabilities(comparisons)]
        prompts = [self.renderer.prompt(comparison) for comparison in comparisons]
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        values = {self.renderer.labels["A"]: -1.0, self.renderer.labels["B"]: 1.0}
        return [values.get(group[0].tokens[0], 0.0) for group in self.sampler.sample(prompts, greedy).result()]

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[LabelProbabilities]:
        """The probabilities of both labels, each comparison as it is shown.

        Raises:
            TrainingError: The model gives something that is not a probability.
        """
        prompts = [self.renderer.prompt(comparison) for comparison in comparisons]
        # The same prompt with either label behind it: the engine computes what they share once.
        sequences = [[*prompt, self.renderer.labels[label]] for prompt in prompts for label in ("A", "B")]
        starts = [len(prompt) for prompt in prompts for _ in range(2)]
        flat = [math.exp(row[0]) for row in self.sampler.logprobs(sequences, starts).result()]
        if not all(map(math.isfinite, flat)):
            raise TrainingError("the preference model gives probabilities that are not finite; its weights are broken")
        return [LabelProbabilities(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]
