"""Where PPO ends: on tasks whose optimum, the reference times exp(score / beta), is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tercet.algorithms.ppo_step import PPO, PPOStepConfig
from tercet.engine.fake import FakeEngine
from tercet.types import Head, SamplingParams

BETA = 0.5


def distance(p, q):
    """Total variation."""
    return float((p - q).abs().sum()) / 2


def optimum(reference, scores):
    weights = reference * (scores / BETA).exp()
    return weights / weights.sum()


class Task:
    """All answers of so many tokens to one prompt, with their scores."""

    def __init__(self, engine, prompt, answers, scores):
        self.engine, self.prompt, self.answers = engine, prompt, answers
        self.scores = dict(zip(answers, scores, strict=True))
        self.reference = self.distribution(engine.sampler())
        self.optimum = optimum(self.reference, torch.tensor(scores))

    def distribution(self, sampler):
        rows = [[self.prompt, *answer] for answer in self.answers]
        return torch.tensor([sum(row) for row in sampler.logprobs(rows).result()]).exp()

    def learned(self, *, steps, n, **settings):
        """The distribution of a policy that learned from its own samples."""
        policy, critic = self.engine.trainer(), self.engine.trainer(head=Head())
        config = PPOStepConfig(
            critic="separate", learning_rate=0.05, critic_learning_rate=0.05, schedule="linear", max_grad_norm=None,
            init_kl_coef=BETA, kl_control="fixed", ppo_epochs=3, mini_batch_size=n // 2, clip_range_value=10.0,
            clip_range=0.5, whiten_advantages=False, **settings,
        )  # fmt: skip
        ours = PPO(config, policy, self.engine.sampler(), critic=critic, total_steps=steps)
        for step in range(steps):
            params = SamplingParams(max_tokens=len(self.answers[0]), seed=step)
            [group] = policy.sampler().sample([[self.prompt]], params, n).result()
            answers = [tuple(each.tokens) for each in group]
            ours.learn([[self.prompt]] * n, answers, [self.scores[answer] for answer in answers])
        return self.distribution(policy.sampler())


@pytest.fixture(scope="module")
def bandit():
    logits = torch.full((5, 5), -40.0)
    logits[4, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    return Task(FakeEngine(vocabulary=5, logits=logits), 4, [(a,) for a in range(4)], [0.0, 1.0, 0.5, 2.0])


@pytest.fixture(scope="module")
def decisions():
    """Three tokens, each 0 or 1, after the prompt 2; the policy sees all tokens before."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.full((3 * 4**3, 3), -40.0)
    logits[:, :2] = 0.3 * torch.randn(len(logits), 2, generator=draw)
    answers = list(itertools.product((0, 1), repeat=3))
    return Task(FakeEngine(vocabulary=3, order=4, logits=logits), 2, answers, torch.randn(8, generator=draw).tolist())


def token_local(task):
    """The policy that weighs each token's expected score against its own KL, blind to the KL of what follows."""
    reference = dict(zip(task.answers, task.reference.tolist(), strict=True))
    policy = {}

    def value(prefix):
        if prefix in task.scores:
            return task.scores[prefix]
        values = [value((*prefix, token)) for token in (0, 1)]
        mass = [sum(p for answer, p in reference.items() if answer[: len(prefix) + 1] == (*prefix, token))
                for token in (0, 1)]  # fmt: skip
        weights = [m * math.exp(v / BETA) for m, v in zip(mass, values, strict=True)]
        policy[prefix] = [weight / sum(weights) for weight in weights]
        return sum(p * v for p, v in zip(policy[prefix], values, strict=True))

    value(())
    return torch.tensor([math.prod(policy[answer[:i]][answer[i]] for i in range(3)) for answer in task.answers])


def test_on_a_bandit_it_ends_at_the_known_optimum(bandit):
    assert distance(bandit.learned(steps=40, n=64), bandit.optimum) < 0.01 < distance(bandit.reference, bandit.optimum)


def test_on_three_decisions_the_kl_in_the_reward_ends_at_the_known_optimum(decisions):
    assert distance(decisions.reference, decisions.optimum) > 0.3
    assert distance(decisions.learned(steps=60, n=64), decisions.optimum) < 0.01


def test_on_three_decisions_the_kl_of_each_token_in_the_loss_ends_elsewhere(decisions):
    local = token_local(decisions)
    learned = decisions.learned(steps=60, n=64, lam=1.0, kl_in="loss", kl_penalty="mse")
    assert distance(learned, local) < 0.05 < distance(learned, decisions.optimum)
    assert distance(local, decisions.optimum) > 0.05


def test_whole_divergences_in_the_reward_hold_no_choice_back(bandit):
    # A token's divergence is the same whichever token is drawn, so the last choice of an answer is free.
    learned = bandit.learned(steps=40, n=64, kl_penalty="full")
    assert float(learned[3]) > 0.85 > float(bandit.optimum[3]) + 0.2
