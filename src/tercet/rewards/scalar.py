"""A scalar reward model: one number for an answer, whatever it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tercet.chat.answers import AnswerRenderer
from tercet.engine.base import Scorer
from tercet.errors import TrainingError
from tercet.rewards.interface import AnswerReward, Candidate
from tercet.rewards.judge import LabelProbabilities
from tercet.types import Comparison, Conversation


class ScalarJudge:
    """Scores answers, and stands wherever a judge stands: the probability that an answer is better is the sigmoid of
    the difference of scores (Bradley & Terry 1952), so that it never depends on the places."""

    def __init__(self, scorer: Scorer, renderer: AnswerRenderer) -> None:
        self.scorer, self.renderer = scorer, renderer

    def scores(self, pairs: Sequence[tuple[Conversation, Conversation]]) -> list[float]:
        """The score of every (prompt, answer); equal ones are computed once.

        Raises:
            TrainingError: The model gives something that is not a number.
        """
        rows = [self.renderer.tokens(prompt, answer) for prompt, answer in pairs]
        places = {tokens: i for i, tokens in enumerate(dict.fromkeys(rows))}
        found = self.scorer.scores(list(places)).result() if places else []
        if not all(map(math.isfinite, found)):
            raise TrainingError("the reward model gives scores that are not finite; its weights are broken")
        return [found[places[tokens]] for tokens in rows]

    def margins(self, comparisons: Sequence[Comparison]) -> list[float]:
        """How much the answer shown second is preferred, in [-1, 1]: 2 sigmoid(second - first) - 1."""
        return [probabilities.margin for probabilities in self.probabilities(comparisons)]

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[LabelProbabilities]:
        """The probability that either answer is the better one."""
        flat = self.scores([(c.prompt, answer) for c in comparisons for answer in (c.a, c.b)])
        return [verdict(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]


class ScalarReward:
    """A reward model's scores as rewards, shifted and scaled so that a reference's answers have mean 0 and spread 1."""

    def __init__(self, judge: ScalarJudge, *, mean: float = 0.0, std: float = 1.0) -> None:
        """Take a reward model, and the mean and standard deviation of its scores of the reference's answers."""
        self.judge, self.mean, self.std = judge, mean, std

    def rewards(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """See `AnswerReward`."""
        scores = self.judge.scores([(each.prompt, each.answer) for each in candidates])
        return [(score - self.mean) / self.std for score in scores]


class RewardJudge:
    """Any reward of single answers where a judge stands: the higher rewarded answer is the better one, with the
    probability sigmoid of the difference."""

    def __init__(self, reward: AnswerReward) -> None:
        self.reward = reward

    def margins(self, comparisons: Sequence[Comparison]) -> list[float]:
        """How much the answer shown second is preferred, in [-1, 1]."""
        return [probabilities.margin for probabilities in self.probabilities(comparisons)]

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[LabelProbabilities]:
        """The probability that either answer is the better one; a half each where the source has nothing to say."""
        shown = [Candidate(c.prompt, answer) for c in comparisons for answer in (c.a, c.b)]
        flat = self.reward.rewards(shown)
        return [verdict(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]


def verdict(a: float | None, b: float | None) -> LabelProbabilities:
    """Bradley & Terry's probabilities that the first, and the second, of two scored answers is better."""
    gap = 0.0 if a is None or b is None else a - b
    return LabelProbabilities(sigmoid(gap), sigmoid(-gap))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
