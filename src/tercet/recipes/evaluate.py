"""Did it get better? Policies answer held-out prompts, judges compare the answers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tercet.algorithms.policy_gradient import SEEDS_PER_RUN
from tercet.algorithms.rollout_metrics import length_metrics
from tercet.algorithms.rollouts import Answer, answer, log_ratios
from tercet.engine.base import Sampler
from tercet.errors import ConfigError, DataError
from tercet.evaluation.win_rate import WinRate, win_rate
from tercet.recipes.rows import Question
from tercet.recipes.session import Session
from tercet.rewards.judge import Compares
from tercet.types import SamplingParams, as_messages


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How policies are compared."""

    prompts: int = 100
    """Held-out prompts answered at the end, at most."""
    prompts_while_training: int = 24
    """Held-out prompts answered at evaluations during RL; the first of the same."""
    against_chosen: int = 16
    """Held-out prompts on which answers also meet the data's chosen ones, and which the base model answers too."""
    max_tokens: int = 48
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""

    def __post_init__(self) -> None:
        if min(self.prompts, self.prompts_while_training) < 2:
            raise ConfigError("a win rate with an interval needs at least 2 prompts")


class Arena:
    """Held-out prompts, the judges, and every policy's answers, each sampled once."""

    def __init__(
        self, session: Session, config: EvaluationConfig, questions: Sequence[Question], judges: Mapping[str, Compares]
    ) -> None:
        self.session, self.config, self.judges = session, config, judges
        limit = session.engine.context_tokens - config.max_tokens
        fitting = [each for each in questions if len(session.renderer.generation_prompt(each.prompt)) <= limit]
        if len(fitting) < len(questions):
            session.say(
                f"{len(questions) - len(fitting)} held-out prompts have more than {limit} tokens and are left out"
            )
        if not fitting:
            raise DataError(f"there is no held-out prompt of at most {limit} tokens to compare policies on")
        self.questions = fitting[: config.prompts]
        self._answers: dict[tuple[str, int], list[Answer]] = {}
        self._rates: dict[tuple[str, str, str, int], WinRate] = {}

    def answers(self, sampler: Sampler, n: int) -> list[Answer]:
        """A policy's answers to the first `n` prompts, sampled once; the seed is the same for all policies."""
        name = sampler.fingerprint()
        for known in (n, len(self.questions)):
            if (name, known) in self._answers:
                return self._answers[name, known][:n]
        self._answers[name, n] = self._sample(sampler, n)
        return self._answers[name, n]

    def rate(self, judge: str, policy: Sampler, start: Sampler, n: int) -> WinRate:
        """Win rate of one policy against another on the first `n` prompts, judged once."""
        key = (judge, policy.fingerprint(), start.fingerprint(), n)
        if key not in self._rates:
            theirs = self.answers(start, len(self.questions))[:n]
            self._rates[key] = compare(self.judges[judge], self.answers(policy, n), theirs)
        return self._rates[key]

    def _sample(self, sampler: Sampler, n: int) -> list[Answer]:
        config = self.config
        params = SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            stop=self.session.renderer.stop,
            # Kept apart from the seeds of the training steps, which count up from the first of the run's own.
            seed=(self.session.setup.seed + 1) * SEEDS_PER_RUN - 1,
        )
        prompts = [each.prompt for each in self.questions[:n]]
        return [group[0] for group in answer(prompts, sampler, self.session.renderer, params, 1)]

    def measure(self, policy: Sampler, start: Sampler, *, last: bool) -> dict[str, float]:
        """Win rate of the policy as it is now against the policy at the start, under every judge."""
        n = len(self.questions) if last else min(self.config.prompts_while_training, len(self.questions))
        found: dict[str, float] = {}
        for name in self.judges:
            rate = self.rate(name, policy, start, n)
            found |= rate.metrics("test/" if name == "preference" else f"test/{name}/")
        return found

    def report(self, policies: Mapping[str, Sampler], start: str) -> dict[str, Any]:
        """Everything `evaluation.json` says of policies; win rates are against `start` and the chosen answers."""
        every = len(self.questions)
        few = min(self.config.against_chosen, every)
        counts = {name: few if name == "base" else every for name in policies}
        answers = {name: self.answers(sampler, counts[name]) for name, sampler in policies.items() if counts[name]}
        rates = [
            _row(name, start, judge, self.rate(judge, policies[name], policies[start], counts[name]))
            for judge in self.judges
            for name in answers
            if name != start
        ]
        met = [(i, each) for i, each in enumerate(self.questions[:few]) if each.chosen]
        for name in answers if met else ():
            prompts = [each.prompt for _, each in met]
            ours = [answers[name][i].conversation for i, _ in met]
            chosen = [each.chosen for _, each in met if each.chosen]
            rates.append(_row(name, "chosen", "preference", win_rate(self.judges["preference"], prompts, ours, chosen)))
        return {
            "win_rates": rates,
            "policies": {name: self._policy(rows, policies[name], policies[start]) for name, rows in answers.items()},
            "samples": [
                {
                    "prompt": as_messages(each.prompt),
                    "answers": {name: rows[i].message.content for name, rows in answers.items() if i < len(rows)},
                }
                for i, each in enumerate(self.questions)
            ],
        }

    def _policy(self, answers: Sequence[Answer], policy: Sampler, reference: Sampler) -> dict[str, float]:
        lengths = length_metrics(answers)
        same = policy.fingerprint() == reference.fingerprint()
        ratios = [] if same else log_ratios([answers], reference, self.config.temperature)
        flat = [p for each in answers for p in each.completion.logprobs]
        return {
            "mean_length": lengths["completions/mean_length"],
            "clipped_ratio": lengths["completions/clipped_ratio"],
            "entropy": -statistics.fmean(flat),
            "kl": statistics.fmean(sum(each) for group in ratios for each in group) if ratios else 0.0,
        }


def compare(judge: Compares, answers: Sequence[Answer], baseline: Sequence[Answer]) -> WinRate:
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
        "consistent": rate.consistent,
    }
