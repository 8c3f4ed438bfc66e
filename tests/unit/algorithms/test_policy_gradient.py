"""Tasks whose optimum is known, and the loop around them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from tercet.algorithms.advantages import advantages
from tercet.algorithms.policy_gradient import RLConfig, learn_groups, policy_gradient, self_check, synchronised
from tercet.algorithms.rollouts import answer, log_ratios
from tercet.engine.fake import FakeEngine
from tercet.errors import TrainingError
from tercet.types import AdamParams, Batch, Datum, Message

LOSSES = ("importance_sampling", "ppo", "cispo")
PROMPTS = [(Message("user", f"{number}?"),) for number in range(6)]
# The reward of a pair of tokens: what comes first decides which second token is best.
REWARDS = {(0, 0): 0.0, (0, 1): 1.0, (0, 2): -1.0, (1, 0): 0.5, (1, 1): -0.5, (1, 2): 0.3, (2, 0): 2.0, (2, 1): -2.0,
           (2, 2): 0.0}  # fmt: skip
START = 3  # the prompt: a token of its own, so that the first answer token has its own distribution
BASE = torch.tensor(
    [[0.2, -0.3, 0.4, -30.0], [0.5, 0.1, -0.2, -30.0], [-0.4, 0.3, 0.6, -30.0], [0.1, 0.6, -0.1, -30.0]]
)


def engine_of_pairs():
    return FakeEngine(vocabulary=4, logits=BASE)


def pair_probabilities(sampler):
    rows = sampler.logprobs([[START, *pair] for pair in REWARDS]).result()
    return {pair: (math.exp(sum(row)), row) for pair, row in zip(REWARDS, rows, strict=True)}


def tv(found, wanted):
    return 0.5 * sum(abs(found[pair] - wanted[pair]) for pair in wanted)


def optimise(loss, beta, steps=250):
    """Policy gradient in exact expectation: every answer once, weighed by how likely the policy finds it."""
    engine = engine_of_pairs()
    trainer, reference = engine.trainer(), pair_probabilities(engine.sampler())
    for step in range(steps):
        policy = pair_probabilities(trainer.sampler())
        # The divergence of the whole answer is part of its reward: early tokens must pay for what they lead to.
        shaped = {x: REWARDS[x] - beta * math.log(policy[x][0] / reference[x][0]) for x in REWARDS}
        mean = sum(policy[x][0] * shaped[x] for x in REWARDS)
        data = [
            Datum(
                [START, *x],
                [0.0, policy[x][0], policy[x][0]],
                {"sampling_logprobs": [0.0, *policy[x][1]], "advantages": [shaped[x] - mean] * 3},
            )
            for x in REWARDS
        ]
        trainer.forward_backward(Batch(data), loss).result()
        trainer.optim_step(AdamParams(learning_rate=0.15 * (1 - step / steps))).result()
    return {x: p for x, (p, _) in pair_probabilities(trainer.sampler()).items()}, reference


@pytest.mark.parametrize("loss", LOSSES)
def test_with_the_divergence_in_the_reward_the_policy_becomes_the_reference_times_exp_reward(loss):
    beta = 0.7
    learned, reference = optimise(loss, beta)
    unnormalised = {x: reference[x][0] * math.exp(REWARDS[x] / beta) for x in REWARDS}
    total = sum(unnormalised.values())
    assert tv(learned, {x: p / total for x, p in unnormalised.items()}) < 0.02
    assert tv(learned, {x: p for x, (p, _) in reference.items()}) > 0.3


@pytest.mark.parametrize("loss", LOSSES)
def test_without_the_divergence_the_best_answer_wins(loss):
    learned, _ = optimise(loss, beta=0.0)
    assert max(learned, key=learned.__getitem__) == (2, 0) and learned[2, 0] > 0.95


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_groups_find_the_optimum_too(loss, bandit, open_run, tmp_path):
    one = bandit((0.4, 0.3, 0.2, 0.1))
    reward, beta = dict(zip("wxyz", (0.0, 0.5, 1.0, 0.2), strict=True)), 0.5
    config = RLConfig(group_size=64, prompts_per_step=2, max_tokens=3, steps=60, learning_rate=0.1, schedule="linear",
                      loss=loss)  # fmt: skip
    trainer, reference = one.engine.trainer(), one.engine.sampler()
    averages = []
    with open_run(tmp_path, steps=60) as run:
        for step in range(60):
            groups = answer(PROMPTS[:2], trainer.sampler(), one.renderer, config.sampling(one.renderer, step), 64)
            ratios = log_ratios(groups, reference, 1.0)
            rewards = [
                [reward[each.message.content] - beta * sum(d) for each, d in zip(*both, strict=True)]
                for both in zip(groups, ratios, strict=True)
            ]
            learn_groups(config, groups, advantages(rewards, scale="rloo"), step, trainer=trainer, run=run)
            averages.append(one.probabilities(trainer.sampler()))
    optimum = torch.tensor([0.4, 0.3, 0.2, 0.1]) * torch.tensor(list(reward.values())).div(beta).exp()
    assert 0.5 * (torch.stack(averages[-20:]).mean(0) - optimum / optimum.sum()).abs().sum() < 0.05


SKILL = {"w": 0.1, "x": 0.4, "y": 0.9, "z": 0.6}


def prefers_y(first, second):
    gap = SKILL.get(second, 0.0) - SKILL.get(first, 0.0)
    return (1 - gap) / 2, (1 + gap) / 2


CONFIG = RLConfig(steps=8, prompts_per_step=3, group_size=4, max_tokens=3, learning_rate=0.3, eval_every_steps=4,
                  save_every_steps=2)  # fmt: skip


def train(one, judge, open_run, directory, config=CONFIG, dies_at=None, reference=None):
    trainer = one.engine.trainer()

    def evaluate(sampler, step):
        return {"test/best": float(one.probabilities(sampler)[2])}

    with open_run(directory, steps=config.steps, dies_at=dies_at) as run:
        policy_gradient(
            config, PROMPTS, one.renderer, judge, reference or one.engine.sampler(),
            trainer=trainer, run=run, evaluate=evaluate, seed=1,
        )  # fmt: skip
    return trainer


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_a_tournament_finds_the_answer_the_judge_prefers(bandit, judge_of, open_run, tmp_path):
    one = bandit()
    config = RLConfig(steps=25, prompts_per_step=4, group_size=4, max_tokens=3, learning_rate=0.3)
    trainer = train(one, judge_of(prefers_y), open_run, tmp_path, config)
    assert float(one.probabilities(trainer.sampler())[2]) > 0.9
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows[-1]["test/best"] > 0.9 > 0.3 > rows[0]["test/best"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[-2]["kl"] > 0.5
    assert rows[-2]["entropy"] < rows[0]["entropy"]


@pytest.mark.parametrize("settings", [
    {"kl_coef": 0.1, "scale": "std"}, {"substeps": 3, "loss": "ppo"}, {"pattern": "one_way", "scale": "rloo"},
    {"judge": "hard", "loss": "cispo", "temperature": 0.7}, {"chunk": 2, "scale": "batch"},
])  # fmt: skip
def test_every_kind_of_step_moves_towards_the_judge(bandit, judge_of, open_run, tmp_path, settings):
    one = bandit()
    config = RLConfig(steps=10, prompts_per_step=3, group_size=4, max_tokens=3, learning_rate=0.2, **settings)
    trainer = train(one, judge_of(prefers_y, verdict=config.judge), open_run, tmp_path, config)
    assert float(one.probabilities(trainer.sampler())[2]) > 0.4


def test_the_divergence_is_taken_off_the_reward(bandit, judge_of, open_run, tmp_path):
    settings = {"steps": 15, "prompts_per_step": 3, "max_tokens": 3, "learning_rate": 0.2}
    free, held = (RLConfig(**settings, kl_coef=coefficient) for coefficient in (0.0, 2.0))
    train(bandit(), judge_of(prefers_y), open_run, tmp_path / "free", free)
    train(bandit(), judge_of(prefers_y), open_run, tmp_path / "held", held)
    kl = {name: rows_of(tmp_path / name / "metrics.jsonl")[-2]["kl"] for name in ("free", "held")}
    assert kl["held"] < 0.3 < 0.7 < kl["free"]


def test_every_step_draws_anew(bandit, judge_of, open_run, tmp_path):
    still = RLConfig(steps=3, prompts_per_step=2, max_tokens=3, learning_rate=1e-9)
    train(bandit(), judge_of(prefers_y), open_run, tmp_path, still)
    rows = rows_of(tmp_path / "samples.jsonl")
    drawn = {step: tuple(row["completion"] for row in rows if row["step"] == step) for step in range(3)}
    assert len(set(drawn.values())) == 3


def test_the_first_step_is_on_policy_whatever_the_temperature(bandit, judge_of, open_run, tmp_path):
    for temperature in (0.7, 1.0, 1.3):
        config = RLConfig(steps=1, prompts_per_step=2, max_tokens=3, temperature=temperature)
        train(bandit((0.4, 0.3, 0.2, 0.1)), judge_of(prefers_y), open_run, tmp_path / str(temperature), config)
        row = rows_of(tmp_path / str(temperature) / "metrics.jsonl")[0]
        assert row["ratio"] == pytest.approx(1, abs=1e-5)
        assert row["sampling/sampling_logp_difference/max"] < 1e-5
        assert row["kl"] == pytest.approx(0, abs=1e-5) and row["kl_k3"] == pytest.approx(0, abs=1e-5)


def test_groups_that_all_get_the_same_reward_change_nothing(bandit, judge_of, open_run, tmp_path):
    one = bandit()
    trainer = train(one, judge_of(lambda a, b: (0.3, 0.3)), open_run, tmp_path)
    assert trainer.fingerprint() == one.engine.trainer().fingerprint()
    row = rows_of(tmp_path / "metrics.jsonl")[0]
    assert (row["frac_reward_zero_std"], row["grad_norm"], row["loss"], row["reward_std"]) == (1, 0, 0, 0)


@pytest.mark.parametrize("dies_at", [0, 1, 2, 5, 7, 8])
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    bandit, judge_of, open_run, died, tmp_path, dies_at
):
    one, judge = bandit(), judge_of(prefers_y)
    expected = train(one, judge, open_run, tmp_path / "straight").fingerprint()
    with pytest.raises(died):
        train(one, judge, open_run, tmp_path / "killed", dies_at=dies_at)
    assert train(one, judge, open_run, tmp_path / "killed").fingerprint() == expected
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_of(tmp_path / "killed" / name) == rows_of(tmp_path / "straight" / name)


def test_every_steps_samples_are_written_down(bandit, judge_of, open_run, tmp_path):
    train(bandit(), judge_of(prefers_y), open_run, tmp_path)
    rows = rows_of(tmp_path / "samples.jsonl")
    assert len(rows) == CONFIG.steps * CONFIG.completions_per_step
    assert {row["step"] for row in rows} == set(range(CONFIG.steps))
    for _, group in itertools.groupby(rows, key=lambda row: (row["step"], row["group"])):
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-9)


def test_a_reference_that_is_not_the_policys_start_is_found_out(bandit, judge_of, open_run, tmp_path):
    other = bandit((0.7, 0.1, 0.1, 0.1)).engine.sampler()
    with pytest.raises(TrainingError, match="policy and reference differ by .* they are not the same model"):
        train(bandit(), judge_of(prefers_y), open_run, tmp_path, reference=other)


def test_a_trainer_that_disagrees_with_its_sampler_is_found_out():
    learned = {"sampling/sampling_logp_difference/mean": 0.5, "ratio": 1.0}
    with pytest.raises(TrainingError, match=r"trainer and sampler differ by 0\.5000 nats"):
        self_check(learned, [[[0.0]]])
    fine = {"sampling/sampling_logp_difference/mean": 0.01, "ratio": 1.25}
    assert self_check(fine, [[[0.01, -0.03]]]) == {
        "check/weights_equal": 1.0,
        "check/ratio_error": 0.25,
        "check/kl_at_start": pytest.approx(-0.02),
        "check/logprob_gap_trainer_and_sampler": 0.01,
        "check/logprob_gap_policy_and_reference": pytest.approx(0.02),
    }


def test_a_sampler_that_holds_older_weights_is_found_out():
    trainer = FakeEngine(vocabulary=2).trainer()
    old = trainer.sampler()
    trainer.forward_backward(Batch([Datum([0, 1], [0, 1])]), "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=0.1)).result()
    assert synchronised(trainer).fingerprint() == trainer.fingerprint()

    class Late(type(trainer)):
        def sampler(self):
            return old

    trainer.__class__ = Late
    with pytest.raises(TrainingError, match="the sampler holds weights"):
        synchronised(trainer)
