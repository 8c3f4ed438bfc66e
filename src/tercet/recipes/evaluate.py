"""Did it get better? Policies answer held-out prompts, judges compare the answers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tercet.algorithms.policy_gradient import log_ratios
from tercet.algorithms.rollouts import Answer, answer, length_metrics
from tercet.engine.base import Sampler
from tercet.errors import ConfigError
from tercet.evaluation.win_rate import WinRate, win_rate
from tercet.recipes.session import Session
from tercet.rewards.judge import Judge
from tercet.types import Comparison, SamplingParams

# Kept apart from the seeds of the training steps, which count up from the run's.
EVALUATION_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How policies are compared."""

    prompts: int = 100
    """Held-out prompts answered at the end, at most."""
    prompts_while_training: int = 32
    """Held-out prompts answered at evaluations during RL; the first of the same."""
    against_chosen: int = 40
    """Held-out prompts on which the answers also meet the data's chosen ones."""
    max_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""

    def __post_init__(self) -> None:
        if min(self.prompts, self.prompts_while_training) < 2:
            raise ConfigError("a win rate with an interval needs at least 2 prompts")


class Arena:
    """Held-out prompts, the judges, and every policy's answers, each sampled once."""

    def __init__(
        self,
        session: Session,
        config: EvaluationConfig,
        comparisons: Sequence[Comparison],
        judges: Mapping[str, Judge],
    ) -> None:
        distinct = list({each.prompt: each for each in comparisons if each.label in ("A", "B")}.values())
        self.session, self.config, self.judges = session, config, judges
        self.comparisons = distinct[: config.prompts]
        self._answers: dict[tuple[str, int], list[Answer]] = {}

    def answers(self, name: str, sampler: Sampler, n: int) -> list[Answer]:
        """A policy's answers to the first `n` prompts; the seed is the same for all policies."""
        key = (name, min(n, len(self.comparisons)))
        if key not in self._answers:
            self._answers[key] = self._sample(sampler, key[1])
        return self._answers[key]

    def _sample(self, sampler: Sampler, n: int) -> list[Answer]:
        config = self.config
        params = SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            stop=self.session.renderer.stop,
            seed=EVALUATION_SEED + self.session.setup.seed,
        )
        prompts = [each.prompt for each in self.comparisons[:n]]
        return [group[0] for group in answer(prompts, sampler, self.session.renderer, params, 1)]

    def while_training(self, policy: Sampler, start: Sampler) -> dict[str, float]:
        """Win rate of the policy as it is now against the policy at the start, under every judge."""
        n = self.config.prompts_while_training
        now, before = self._sample(policy, min(n, len(self.comparisons))), self.answers("start", start, n)
        found: dict[str, float] = {}
        for name, judge in self.judges.items():
            rate = compare(judge, now, before)
            found |= rate.metrics("test/" if name == "preference" else f"test/{name}/")
        return found

    def report(self, policies: Mapping[str, Sampler], start: str) -> dict[str, Any]:
        """Everything `evaluation.json` says of policies; win rates are against `start` and the chosen answers."""
        n = len(self.comparisons)
        answers = {name: self.answers(name, sampler, n) for name, sampler in policies.items()}
        rates = []
        for judge_name, judge in self.judges.items():
            for name in policies:
                if name != start:
                    rates.append(_row(name, start, judge_name, compare(judge, answers[name], answers[start])))
            few = self.comparisons[: self.config.against_chosen]
            for name in policies if few and judge_name == "preference" else ():
                prompts = [each.prompt for each in few]
                ours = [each.conversation for each in answers[name][: len(few)]]
                chosen = [each.chosen for each in few]
                rates.append(_row(name, "chosen", judge_name, win_rate(judge, prompts, ours, chosen)))
        return {
            "win_rates": rates,
            "policies": {name: self._policy(answers[name], policies[start]) for name in policies},
            "samples": [
                {
                    "prompt": [{"role": m.role, "content": m.content} for m in each.prompt],
                    "answers": {name: answers[name][i].message.content for name in policies},
                }
                for i, each in enumerate(self.comparisons)
            ],
        }

    def _policy(self, answers: Sequence[Answer], reference: Sampler) -> dict[str, float]:
        lengths = length_metrics(answers)
        sums = [sum(d) for group in log_ratios([answers], reference, self.config.temperature) for d in group]
        flat = [p for each in answers for p in each.completion.logprobs]
        return {
            "mean_length": lengths["completions/mean_length"],
            "clipped_ratio": lengths["completions/clipped_ratio"],
            "entropy": -statistics.fmean(flat),
            "kl": statistics.fmean(sums),
        }


def compare(judge: Judge, answers: Sequence[Answer], baseline: Sequence[Answer]) -> WinRate:
    """Win rate of answers against a baseline's to the same prompts."""
    return win_rate(
        judge,
        [each.prompt for each in answers],
        [each.conversation for each in answers],
        [each.conversation for each in baseline],
    )


def _row(policy: str, against: str, judge: str, rate: WinRate) -> dict[str, Any]:
    return {
        "policy": policy,
        "against": against,
        "judge": judge,
        "win_rate": rate.win_rate,
        "stderr": rate.stderr,
        "low": rate.low,
        "high": rate.high,
        "n": rate.n,
        "mean_margin": rate.mean_margin,
    }
