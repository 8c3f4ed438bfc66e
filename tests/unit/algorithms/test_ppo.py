"""The loop: samples, scores, learns, and goes on where it stood."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tercet.algorithms.ppo import PPOConfig, ppo
from tercet.algorithms.ppo_step import PPO
from tercet.errors import ConfigError, RewardError
from tercet.rewards.combined import WeightedSum
from tercet.rewards.functions import FunctionReward
from tercet.rewards.interface import Each
from tercet.types import Head
from tests.unit.algorithms.conftest import ARMS, PROMPTS

CONFIG = PPOConfig(
    steps=4, prompts_per_step=4, mini_batch_size=2, max_tokens=3, learning_rate=0.05, eval_every_steps=2, horizon=50.0,
    score_scaling="mean_std", score_clip=2.0,
)  # fmt: skip


def later_letters_are_better(prompts, completions):
    return [float(ARMS.find(completion[:1])) for completion in completions]


REWARD = WeightedSum({"letters": (Each(FunctionReward(later_letters_are_better, shows="text")), 1.0)})


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def train(bandit, open_run, directory, config=CONFIG, reward=REWARD, dies_at=None, columns=None):
    made = bandit()
    shared = config.critic == "shared"
    policy = made.engine.trainer(head=Head(init_std=0.0) if shared else None)
    critic = None if shared else made.engine.trainer(head=Head(), seed=1)
    with open_run(directory, steps=config.steps, dies_at=dies_at) as run:
        learner = PPO(config, policy, made.engine.sampler(), critic=critic, total_steps=config.steps, seed=3, run=run)
        ppo(
            config, PROMPTS, made.renderer, reward, learner, run=run, seed=3, columns=columns,
            evaluate=lambda sampler, step: {"test/last": float(made.probabilities(sampler)[-1])},
        )  # fmt: skip
    return policy.fingerprint(), None if critic is None else critic.fingerprint(), learner.state


@pytest.mark.parametrize("dies_at", [0, 1, 3, 4])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    bandit, open_run, died, tmp_path, dies_at, critic
):
    config = PPOConfig(**{**vars(CONFIG), "critic": critic})
    expected = train(bandit, open_run, tmp_path / "straight", config)
    with pytest.raises(died):
        train(bandit, open_run, tmp_path / "killed", config, dies_at=dies_at)
    assert train(bandit, open_run, tmp_path / "killed", config) == expected
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_of(tmp_path / "killed" / name) == rows_of(tmp_path / "straight" / name)


def test_a_done_run_is_left_as_it_is(bandit, open_run, tmp_path):
    train(bandit, open_run, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(bandit, open_run, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_every_step_tells_what_was_sampled_scored_and_learned(bandit, open_run, tmp_path):
    train(bandit, open_run, tmp_path)
    *steps, last = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in steps] == [0, 1, 2, 3] and last.keys() == {"step", "test/last"}
    assert all(math.isfinite(value) for row in steps for value in row.values())
    assert {"objective/kl", "ppo/mean_scores", "ppo/loss/value", "reward", "format"} <= steps[0].keys()
    assert steps[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert ["test/last" in row for row in steps] == [True, False, True, False]
    samples = rows_of(tmp_path / "samples.jsonl")
    assert len(samples) == 16
    first = [row for row in samples if row["step"] == 0]
    assert [row["reward"] for row in first] == [float(ARMS.find(row["completion"])) for row in first]
    # The first batch is scaled by its own moments.
    rewards = torch.tensor([row["reward"] for row in first])
    scaled = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    assert [row["score"] for row in first] == pytest.approx(scaled.clamp(-2, 2).tolist(), abs=1e-5)


def test_a_reward_is_told_the_columns_of_a_prompt(bandit, open_run, tmp_path):
    seen = []

    def look(prompts, completions, wanted):
        seen.extend(wanted)
        return [0.5] * len(prompts)

    columns = {prompt: {"wanted": i} for i, prompt in enumerate(PROMPTS)}
    reward = WeightedSum({"look": (Each(FunctionReward(look)), 1.0)})
    train(bandit, open_run, tmp_path, reward=reward, columns=columns)
    assert len(seen) == 16 and set(seen) <= set(range(len(PROMPTS)))


def test_a_reward_that_fails_stops_the_run_and_is_no_zero(bandit, open_run, tmp_path):
    def broken(prompts, completions):
        return [math.nan] * len(prompts)

    with pytest.raises(RewardError, match="broken gave nan"):
        train(bandit, open_run, tmp_path, reward=WeightedSum({"broken": (Each(FunctionReward(broken)), 1.0)}))
    assert rows_of(tmp_path / "samples.jsonl") == [] if (tmp_path / "samples.jsonl").exists() else True


def test_it_learns_which_answer_is_better(bandit, open_run, tmp_path):
    config = PPOConfig(
        steps=30, prompts_per_step=16, mini_batch_size=8, max_tokens=3, learning_rate=0.1, critic="separate",
        critic_learning_rate=0.1, init_kl_coef=0.05, kl_control="fixed", clip_range=1.0,
    )  # fmt: skip
    train(bandit, open_run, tmp_path, config)
    first, *_, last = rows_of(tmp_path / "metrics.jsonl")
    assert first["reward"] < 2 and last["test/last"] > 0.7


def test_a_step_must_hold_whole_mini_batches():
    with pytest.raises(ConfigError, match="3 prompts x 1 answers are 3 a step, which must be a multiple of .*16"):
        PPOConfig(prompts_per_step=3)
