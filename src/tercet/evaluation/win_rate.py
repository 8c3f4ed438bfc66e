"""How often a judge prefers one policy's answers to another's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.rewards.judge import Judge
from tercet.types import Comparison, Conversation


@dataclass(frozen=True)
class WinRate:
    """Mean score over prompts: 1 for a win in both orders, 0 for a loss in both, 0.5 where the order decides."""

    win_rate: float
    stderr: float
    n: int
    mean_margin: float
    """Mean preference in [-1, 1], which also says by how much."""

    @property
    def low(self) -> float:
        """Lower end of the 95% interval (normal approximation), at least 0."""
        return max(0.0, self.win_rate - 1.96 * self.stderr)

    @property
    def high(self) -> float:
        """Upper end of the 95% interval, at most 1."""
        return min(1.0, self.win_rate + 1.96 * self.stderr)

    def metrics(self, prefix: str = "test/") -> dict[str, float]:
        """Under the keys of `metrics.jsonl`."""
        return {
            f"{prefix}win_rate": self.win_rate,
            f"{prefix}win_rate_stderr": self.stderr,
            f"{prefix}win_rate_low": self.low,
            f"{prefix}win_rate_high": self.high,
        }


def win_rate(
    judge: Judge,
    prompts: Sequence[Conversation],
    answers: Sequence[Conversation],
    baseline: Sequence[Conversation],
) -> WinRate:
    """Judge each answer against the baseline's in both orders.

    With r the verdict (+1: shown second wins) the score of a prompt is (r(baseline first) - r(policy first) + 2) / 4, the
    cookbook's. Equal answers are a tie, whatever the judge says.

    Raises:
        ValueError: There are no prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to compare answers on")
    shown = [Comparison(p, b, a) for p, a, b in zip(prompts, answers, baseline, strict=True)]
    margins = judge.margins([each for comparison in shown for each in (comparison, comparison.swapped())])
    scores, means = [], []
    for comparison, policy_second, policy_first in zip(shown, margins[::2], margins[1::2], strict=True):
        tie = comparison.a == comparison.b
        scores.append(0.5 if tie else (_sign(policy_second) - _sign(policy_first) + 2) / 4)
        means.append(0.0 if tie else (policy_second - policy_first) / 2)
    spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.5
    return WinRate(statistics.fmean(scores), spread, len(scores), statistics.fmean(means))


def _sign(margin: float) -> int:
    return (margin > 0) - (margin < 0)
