"""Answers drawn by a policy that is not quite the trainer's, weighed until they are as good as its own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from tercet.algorithms.importance import corrected, sequence_mask, sequence_ratio, weighted
from tercet.algorithms.policy_gradient import RLConfig, policy_gradient
from tercet.algorithms.rollouts import answer
from tercet.errors import ConfigError
from tercet.rewards.judge import LabelProbabilities
from tercet.types import Message, SamplingParams

DOCS = (Path(__file__).parents[3] / "docs/rl.md").read_text()
PROMPTS = [(Message("user", f"{number}?"),) for number in range(6)]
TRAINED, DRAWN = (0.1, 0.2, 0.3, 0.4), (0.4, 0.25, 0.25, 0.1)


def test_the_ratio_is_that_of_whole_answers():
    log = math.log
    assert sequence_ratio([log(0.5), log(0.5)], [log(0.25), log(0.4)]) == pytest.approx(2 * 1.25)
    assert sequence_ratio([log(0.5)] * 3, [log(0.5)] * 3) == 1.0
    assert sequence_ratio([0.0], [-1000.0]) == pytest.approx(math.exp(20))


def test_an_answer_above_the_cap_counts_nothing_and_the_others_by_their_ratio():
    assert sequence_mask([0.5, 1.0, 3.0, 3.1, 40.0], cap=3.0) == [0.5, 1.0, 3.0, 0.0, 0.0]
    assert weighted([[1.0, -2.0], [4.0]], [[0.5, 3.0], [0.0]]) == [[0.5, -6.0], [0.0]]


def draw(bandit, n):
    """Answers of another policy, and the trainer that learns from them."""
    other, one = bandit(DRAWN), bandit(TRAINED)
    groups = answer(PROMPTS[:2], other.engine.sampler(), other.renderer,
                    SamplingParams(max_tokens=3, stop=other.renderer.stop), n)  # fmt: skip
    return groups, one.engine.trainer()


def test_weighed_answers_of_another_policy_have_the_trainers_averages(bandit):
    groups, trainer = draw(bandit, 1500)
    own, weights, seen = corrected(groups, trainer, temperature=1.0, cap=100.0)
    ratio = dict(zip("wxyz", [p / q for p, q in zip(TRAINED, DRAWN, strict=True)], strict=True))
    share = dict.fromkeys("wxyz", 0.0)
    for group, row in zip(own, weights, strict=True):
        for each, weight in zip(group, row, strict=True):
            assert weight == pytest.approx(ratio[each.message.content], rel=1e-4)
            assert math.exp(each.completion.logprobs[0]) == pytest.approx(
                TRAINED["wxyz".index(each.message.content)], rel=1e-4
            )
            share[each.message.content] += weight / 3000
    assert torch.tensor(list(share.values())) == pytest.approx(torch.tensor(TRAINED), abs=0.04)
    assert seen["sampling/importance_sampling_ratio/max"] == pytest.approx(4.0, rel=1e-4)
    assert seen["sampling/importance_sampling_ratio/min"] == pytest.approx(0.25, rel=1e-4)
    assert seen["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.1)
    assert seen["sampling/kept"] == 1.0


def test_the_cap_leaves_out_what_the_other_policy_hardly_ever_says(bandit):
    groups, trainer = draw(bandit, 50)
    own, weights, seen = corrected(groups, trainer, temperature=1.0, cap=3.0)
    rare = [each.message.content == "z" for group in own for each in group]
    assert [weight == 0 for row in weights for weight in row] == rare and any(rare)
    assert seen["sampling/kept"] == pytest.approx(1 - sum(rare) / 100)
    assert seen["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(4), abs=1e-3)


class PrefersY:
    def probabilities(self, comparisons):
        found = [(c.a[0].content == "y", c.b[0].content == "y") for c in comparisons]
        return [LabelProbabilities(0.5 + (a - b) / 4, 0.5 + (b - a) / 4) for a, b in found]

    def margins(self, comparisons):
        return [each.margin for each in self.probabilities(comparisons)]


def learn(bandit, open_run, directory, *, foreign_sampler):
    one = bandit()
    trainer = one.engine.trainer()
    config = RLConfig(steps=3, prompts_per_step=3, group_size=4, max_tokens=3, learning_rate=0.3, eval_every_steps=0)
    with open_run(directory, steps=3) as run:
        policy_gradient(
            config, PROMPTS, one.renderer, PrefersY(), one.engine.sampler(), trainer=trainer, run=run,
            evaluate=lambda sampler, step: {}, seed=0, foreign_sampler=foreign_sampler,
        )  # fmt: skip
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return one.probabilities(trainer.sampler()), rows


def test_a_sampler_that_computes_as_the_trainer_needs_no_correction(bandit, open_run, tmp_path):
    plain, without = learn(bandit, open_run, tmp_path / "plain", foreign_sampler=False)
    same, with_it = learn(bandit, open_run, tmp_path / "foreign", foreign_sampler=True)
    assert plain[2] > 0.3 and same == pytest.approx(plain, abs=1e-5)
    added = with_it[0].keys() - without[0].keys()
    assert all(row["sampling/kept"] == 1.0 for row in with_it[:3])
    assert all(row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4) for row in with_it[:3])
    described = DOCS[DOCS.index("## Answers drawn by another program") : DOCS.index("## Self-checks")]
    assert added <= set(re.findall(r"`([^`]+)`", described))


def test_a_cap_below_one_would_leave_out_the_policys_own_answers():
    with pytest.raises(ConfigError, match=r"importance_cap is 0.5; it must be at least 1"):
        RLConfig(importance_cap=0.5)
