"""The step of manual loops: what it takes, what it refuses, what it tells and when it stops."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from tercet.algorithms.ppo_batch import Rollouts, policy_figures, targets
from tercet.algorithms.ppo_step import PPO, PPOStepConfig
from tercet.engine.fake import FakeEngine
from tercet.errors import ConfigError, DataError, UsageError
from tercet.types import Head, SamplingParams, Weights

CONFIG = PPOStepConfig(mini_batch_size=2, ppo_epochs=2, learning_rate=0.05, init_kl_coef=0.2)
QUERIES, RESPONSES, SCORES = [[4, 1], [4], [4, 2, 2], [4]], [[0, 1], [2], [3, 0, 1], [1, 1]], [1.0, 0.0, -1.0, 0.5]


def learner(config=CONFIG, *, seed=0, **settings):
    draw = torch.Generator().manual_seed(seed)
    engine = FakeEngine(vocabulary=5, logits=torch.randn(5, 5, generator=draw))
    critic = engine.trainer(head=Head(), seed=1) if config.critic == "separate" else None
    policy = engine.trainer(head=None if critic else Head(), seed=1)
    return PPO(config, policy, engine.sampler(), critic=critic, **settings)


def close(values):
    return pytest.approx(values, abs=1e-9)


SEEN = Rollouts(
    queries=[[1], [1, 2]],
    responses=[[3, 4], [5]],
    scores=[2.0, 1.0],
    logprobs=[[-1.0, -0.5], [-2.0]],
    reference_logprobs=[[-1.5, -0.25], [-2.5]],
    entropies=[[1.0, 1.0], [1.0]],
    values=[[0.5, 1.0], [0.25]],
    kl=[[0.5, -0.25], [0.5]],
)


def test_the_score_stands_on_the_last_token_and_the_kl_on_every_one():
    rewards = SEEN.token_rewards(0.2)
    assert rewards == [close([-0.1, 0.05 + 2.0]), close([-0.1 + 1.0])]
    # What is left when the scores are taken off is the charge for the KL, and nothing else.
    assert sum(map(sum, rewards)) - sum(SEEN.scores) == close(-0.2 * 0.75)


def test_returns_are_those_of_the_advantages_before_they_are_whitened():
    plain = targets([[0.0, 2.0], [1.0]], SEEN.values, gamma=1.0, lam=1.0, whiten_rewards=False, whiten_advantages=False)
    assert plain.advantages == [close([1.5, 1.0]), close([0.75])]
    assert plain.returns == [close([2.0, 2.0]), close([1.0])]
    white = targets([[0.0, 2.0], [1.0]], SEEN.values, gamma=1.0, lam=1.0, whiten_rewards=False, whiten_advantages=True)
    assert white.returns == plain.returns
    mean, spread = 3.25 / 3, statistics.variance([1.5, 1.0, 0.75])
    assert white.advantages[1] == close([(0.75 - mean) / math.sqrt(spread + 1e-8)])


def test_the_figures_are_those_of_trl_under_its_keys():
    wanted = targets(
        SEEN.token_rewards(0.2), SEEN.values, gamma=1.0, lam=1.0, whiten_rewards=False, whiten_advantages=False
    )
    figures = policy_figures(SEEN, wanted, 0.2)
    expected = {
        "objective/kl": (0.25 + 0.5) / 2,  # mean over answers of the sum over tokens
        "ppo/kl": 0.375,
        "objective/kl_coef": 0.2,
        "objective/entropy": (1.5 + 2.0) / 2,
        "ppo/mean_non_score_reward": -0.2 * 0.75 / 3,  # mean over tokens
        "ppo/mean_scores": 1.5,
        "ppo/std_scores": math.sqrt(0.5),
        "ppo/returns/mean": (1.95 + 2.05 + 0.9) / 3,
        "ppo/returns/var": statistics.variance([1.95, 2.05, 0.9]),
        "ppo/val/mean": 1.75 / 3,
        "ppo/val/var": statistics.variance([0.5, 1.0, 0.25]),
        "ppo/policy/advantages_mean": (1.45 + 1.05 + 0.65) / 3,
        "tokens/queries_len_mean": 1.5,
        "tokens/queries_len_std": math.sqrt(0.5),
        "tokens/responses_len_mean": 1.5,
        "tokens/responses_len_std": math.sqrt(0.5),
    }
    assert figures == {name: close(value) for name, value in expected.items()}


TOLD = {
    "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy", "ppo/policy/approxkl",
    "ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/policy/ratio", "ppo/policy/skipped", "ppo/val/vpred",
    "ppo/val/error", "ppo/val/clipfrac", "ppo/val/var_explained", "ppo/learning_rate", "ppo/grad_norm", "ppo/epochs",
}  # fmt: skip


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_step_tells_the_same_with_either_critic(critic):
    stats = learner(replace(CONFIG, critic=critic)).step(QUERIES, RESPONSES, SCORES)
    assert stats.keys() >= TOLD and all(map(math.isfinite, stats.values()))
    assert stats["ppo/epochs"] == 2
    total = stats["ppo/loss/policy"] + CONFIG.vf_coef * stats["ppo/loss/value"]
    assert stats["ppo/loss/total"] == pytest.approx(total)


def test_before_anything_is_learned_the_ratio_is_1_and_the_kl_0():
    stats = learner(replace(CONFIG, ppo_epochs=1, mini_batch_size=4)).step(QUERIES, RESPONSES, SCORES)
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_queries_may_be_rows_of_a_matrix_and_responses_tensors():
    def weights(queries, responses):
        ours = learner()
        ours.step(queries, responses, [torch.tensor(score) for score in SCORES])
        return ours.policy.fingerprint()

    matrices = [torch.tensor([query]) for query in QUERIES]
    assert weights(matrices, [torch.tensor(r) for r in RESPONSES]) == weights(QUERIES, RESPONSES)


@pytest.mark.parametrize(("queries", "responses", "scores", "error", "message"), [
    (QUERIES, [[*q, *r] for q, r in zip(QUERIES, RESPONSES, strict=True)], SCORES, UsageError,
     "response 0 begins with its query of 2 tokens"),
    (QUERIES, [[], *RESPONSES[1:]], SCORES, DataError, r"response 0 is \[\]"),
    ([torch.tensor([[1, 2], [3, 4]]), *QUERIES[1:]], RESPONSES, SCORES, DataError, r"of shape \(n,\) or \(1, n\)"),
    (QUERIES[:3], RESPONSES, SCORES, UsageError, "3 queries, 4 responses and 4 rewards"),
    (QUERIES[:3], RESPONSES[:3], SCORES[:3], ConfigError, "multiple of mini_batch_size"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused(queries, responses, scores, error, message):
    ours = learner()
    before = ours.policy.fingerprint()
    with pytest.raises(error, match=message):
        ours.step(queries, responses, scores)
    assert (ours.policy.fingerprint(), ours.kl_coef, ours.steps) == (before, 0.2, 0)


def test_what_is_generated_is_the_response_alone_and_can_be_learned():
    ours = learner()
    responses = ours.generate(QUERIES, SamplingParams(max_tokens=3))
    assert [len(response) for response in responses] == [3] * 4
    assert [row[: len(q)] for row, q in zip(
        ours.generate([torch.tensor([q]) for q in QUERIES], SamplingParams(max_tokens=3), return_prompt=True), QUERIES,
        strict=True,
    )] == QUERIES  # fmt: skip


def epochs(**settings):
    """Epochs of a policy that moves away from answers that are all bad."""
    config = replace(
        CONFIG, learning_rate=0.5, ppo_epochs=4, mini_batch_size=4, whiten_advantages=False, clip_range=10.0, **settings
    )
    return learner(config).step(QUERIES, RESPONSES, [-9.0] * 4)["ppo/epochs"]


def test_early_stopping_looks_at_the_end_of_an_epoch_and_is_off_by_default():
    assert epochs(target_kl=1e-3) == 4
    # In the first epoch nothing has moved when its one mini-batch is looked at.
    assert epochs(target_kl=1e-3, early_stopping=True) == 2
    assert epochs(target_kl=100.0, early_stopping=True) == 4


def test_target_kl_does_not_move_the_coefficient_and_the_target_does():
    def coef(**settings):
        ours = learner(replace(CONFIG, horizon=40.0, **settings))
        ours.step(QUERIES, RESPONSES, SCORES)
        return ours.kl_coef

    assert coef(target_kl=0.1) == coef(target_kl=50.0) == pytest.approx(0.2 * (1 - 0.2 * 4 / 40))
    assert coef(kl_control="fixed") == 0.2


def test_a_mini_batch_whose_ratio_ran_away_teaches_nothing():
    ours = learner(replace(CONFIG, ratio_threshold=1e-9, weight_decay=0.0, mini_batch_size=4))
    before = ours.policy.fingerprint()
    stats = ours.step(QUERIES, RESPONSES, SCORES)
    assert stats["ppo/policy/skipped"] == 1.0
    assert ours.policy.fingerprint() == before


def test_the_order_of_answers_is_the_callers_if_he_likes():
    asked = []
    ours = learner(permutation=lambda epoch, n: asked.append((epoch, n)) or list(range(n)))
    ours.step(QUERIES, RESPONSES, SCORES)
    ours.step(QUERIES, RESPONSES, SCORES)
    assert asked == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_saved_and_restored_it_goes_on_bit_for_bit(tmp_path, critic):
    config = replace(CONFIG, critic=critic, horizon=40.0)
    ours, other = learner(config, seed=3), learner(config, seed=3)
    ours.step(QUERIES, RESPONSES, SCORES)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved").result()
    state = dict(ours.state)
    last = ours.step(QUERIES, RESPONSES, SCORES)
    other.restore(Weights(tmp_path / "saved"), state)
    assert other.step(QUERIES, RESPONSES, SCORES) == last
    assert other.policy.fingerprint() == ours.policy.fingerprint()
    assert other.state == ours.state
    if ours.critic is not None:
        assert other.critic.fingerprint() == ours.critic.fingerprint()


def test_the_reference_does_not_move():
    ours = learner()
    before = ours.reference.fingerprint()
    ours.step(QUERIES, RESPONSES, SCORES)
    assert ours.reference.fingerprint() == before != ours.policy.fingerprint()


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": 0}, "temperature is 0"), ({"ppo_epochs": 0}, "ppo_epochs is 0"), ({"target": 0}, "target is 0"),
    ({"kl_in": "loss", "kl_penalty": "full"}, "can only be charged in the reward"), ({"horizon": -1}, "horizon is -1"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **settings)


def test_a_critic_that_is_missing_or_not_used_and_a_schedule_without_end_are_refused():
    engine = FakeEngine(vocabulary=5)
    with pytest.raises(UsageError, match="critic is separate, and none is given"):
        PPO(replace(CONFIG, critic="separate"), engine.trainer(), engine.sampler())
    with pytest.raises(UsageError, match="critic is shared, and a separate one is given"):
        PPO(CONFIG, engine.trainer(head=Head()), engine.sampler(), critic=engine.trainer(head=Head()))
    with pytest.raises(ConfigError, match="give total_steps"):
        learner(replace(CONFIG, schedule="linear"))
