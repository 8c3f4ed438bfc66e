"""How often a judge prefers one policy's answers to another's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tercet.rewards.judge import Compares
from tercet.types import Comparison, Conversation


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the judge, its two orders averaged, prefers the policy's answer; a tie is half one."""

    win_rate: float
    stderr: float
    n: int
    mean_margin: float
    """Mean preference in [-1, 1], which also says by how much."""
    consistent: float = 1.0
    """Share of the prompts with unequal answers on which both orders give the same verdict."""
    scores: tuple[float, ...] = ()
    """For each prompt 1 (the policy's answer is better), 0, or 0.5 (a tie)."""

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
    judge: Compares,
    prompts: Sequence[Conversation],
    answers: Sequence[Conversation],
    baseline: Sequence[Conversation],
) -> WinRate:
    """Judge each answer against the baseline's in both orders; the sign of the mean margin decides, as in a tournament.

    A preference for a place cancels. With a hard judge verdicts that contradict each other are a tie, as in the
    cookbook. Equal answers are a tie, whatever the judge says.

    Raises:
        ValueError: There are no prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to compare answers on")
    shown = [Comparison(p, b, a) for p, a, b in zip(prompts, answers, baseline, strict=True)]
    different = [each for each in shown if each.a != each.b]
    margins = judge.margins([each for comparison in different for each in (comparison, comparison.swapped())])
    met = ((second - first) / 2 for second, first in zip(margins[::2], margins[1::2], strict=True))
    means = [next(met) if each.a != each.b else 0.0 for each in shown]
    scores = [0.5 if mean == 0 else float(mean > 0) for mean in means]
    agreeing = sum((a > 0) != (b > 0) for a, b in zip(margins[::2], margins[1::2], strict=True))
    spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.5
    return WinRate(
        statistics.fmean(scores),
        spread,
        len(scores),
        statistics.fmean(means),
        agreeing / max(1, len(different)),
        tuple(scores),
    )
