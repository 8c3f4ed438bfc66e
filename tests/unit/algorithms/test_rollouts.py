from __future__ import annotations

import math

import pytest
import torch

from tercet.algorithms.advantages import advantages
from tercet.algorithms.rollout_metrics import (
    kl_metrics,
    length_metrics,
    reward_metrics,
    sample_rows,
    sampler_metrics,
)
from tercet.algorithms.rollouts import Answer, answer, log_ratios, tournament_rewards
from tercet.types import Completion, Message, SamplingParams

PROMPT = (Message("user", "?"),)


def said(text, *, stop="stop", tokens=(7, 8), logprobs=(-1.0, -2.0), prompt_tokens=(4, 5, 6)):
    reason = {"stop": "stop", "eos": "eos", "malformed": "length"}[stop]
    return Answer(PROMPT, prompt_tokens, Completion(tokens, logprobs, reason), Message("assistant", text), stop)


def test_an_answer_is_learned_from_its_first_token_to_its_stop():
    datum = said("x").datum(sampling_logprobs=[-1.0, -2.0], advantages=0.5)
    assert datum.tokens == (4, 5, 6, 7, 8)
    assert datum.weights == [0, 0, 0, 1, 1]
    assert datum.streams == {"sampling_logprobs": [0, 0, 0, -1, -2], "advantages": [0, 0, 0, 0.5, 0.5]}


def test_the_sampled_tokens_are_kept_as_they_were_drawn(bandit):
    one = bandit()
    params = SamplingParams(max_tokens=4, stop=one.renderer.stop)
    [group] = answer([PROMPT], one.engine.sampler(), one.renderer, params, 6)
    for each in group:
        assert each.prompt_tokens == tuple(one.renderer.generation_prompt(PROMPT))
        assert each.completion.tokens[0] in one.arms and len(each.completion.tokens) == 2
        assert each.message == Message("assistant", one.renderer.tokenizer.decode([each.completion.tokens[0]]))
        assert each.termination == "stop"
    assert len({each.message.content for each in group}) > 1


STRENGTH = {"best": 0.8, "mean": 0.5, "poor": 0.2}


def strength(first, second):
    return 0.5 + (STRENGTH[first] - STRENGTH[second]) / 2, 0.5 - (STRENGTH[first] - STRENGTH[second]) / 2


def test_tournament_rewards_by_hand(judge_of):
    groups = [[said("best"), said("mean"), said("poor")], [said("mean"), said("mean"), said("best", stop="malformed")]]
    rewards, seen = tournament_rewards(groups, judge_of(strength), pattern="both_ways", chunk=None, format_penalty=1.0)
    # A margin is the difference of strengths; an answer's reward its mean over the two others.
    assert rewards == [pytest.approx([0.45, 0.0, -0.45]), pytest.approx([-0.15, -0.15, 0.3 - 1])]
    assert seen["format"] == pytest.approx(5 / 6)
    assert seen["win_minus_loss"] == pytest.approx((0.45 + 0 + 0.45 + 0.15 + 0.15 + 0.3) / 6)
    assert seen["judge/flip_rate"] == 0
    # The penalty breaks the zero sum; centring restores it.
    assert advantages(rewards)[1] == pytest.approx([-0.15 + 1 / 3, -0.15 + 1 / 3, -0.7 + 1 / 3])


def test_only_a_stop_escapes_the_format_penalty(judge_of):
    group = [said("mean"), said("mean", stop="eos"), said("mean", stop="malformed")]
    [rewards], _ = tournament_rewards([group], judge_of(strength), pattern="both_ways", chunk=None, format_penalty=0.5)
    assert rewards == pytest.approx([0, -0.5, -0.5])


def test_a_judges_bias_for_a_place_stays_in_the_rewards_one_way_only(judge_of):
    def biased(first, second):
        return 0.2, 0.7

    group = [said("mean"), said("poor"), said("best")]
    ask = {"chunk": None, "format_penalty": 0.0}
    [both], seen = tournament_rewards([group], judge_of(biased), pattern="both_ways", **ask)
    [one_way], unseen = tournament_rewards([group], judge_of(biased), pattern="one_way", **ask)
    assert (both, one_way) == (pytest.approx([0, 0, 0]), pytest.approx([-0.5, 0, 0.5]))
    assert seen["judge/flip_rate"] == 1 and "judge/flip_rate" not in unseen


def test_log_ratios_are_those_of_each_token_at_the_sampling_temperature(bandit):
    policy, reference = bandit((0.4, 0.3, 0.2, 0.1)), bandit()
    groups = answer(
        [PROMPT] * 2, policy.engine.sampler(),
        policy.renderer, SamplingParams(max_tokens=4, temperature=0.5, stop=policy.renderer.stop), 3,
    )  # fmt: skip
    squared = torch.tensor([0.4, 0.3, 0.2, 0.1]) ** 2
    expected = torch.log(squared / squared.sum() / 0.25).tolist()
    found = log_ratios(groups, reference.engine.sampler(), 0.5)
    for group, row in zip(groups, found, strict=True):
        for each, ratios in zip(group, row, strict=True):
            arm = policy.arms.index(each.completion.tokens[0])
            assert ratios == pytest.approx([expected[arm], 0.0], abs=1e-5)


def test_lengths_by_hand():
    answers = [said("x"), said("x", tokens=(7,) * 5, logprobs=(0.0,) * 5, stop="malformed"), said("x", stop="eos")]
    assert length_metrics(answers) == {
        "completions/mean_length": 3.0,
        "completions/clipped_ratio": pytest.approx(1 / 3),
        "completions/mean_terminated_length": 2.0,
    }
    assert length_metrics(answers[1:2])["completions/mean_terminated_length"] == 0


def test_rewards_by_hand():
    long = {"tokens": (7,) * 4, "logprobs": (0.0,) * 4}
    groups = [[said("a"), said("b", **long)], [said("c"), said("d", **long)]]
    found = reward_metrics(groups, [[1.0, 3.0], [2.0, 2.0]])
    assert found["reward"] == 2 and found["frac_reward_zero_std"] == 0.5
    assert found["reward_std"] == pytest.approx(math.sqrt(2 / 3))
    assert found["reward_length_correlation"] == pytest.approx(1 / math.sqrt(2))
    assert reward_metrics(groups, [[1.0, 1.0], [1.0, 1.0]])["reward_length_correlation"] == 0


def test_divergences_by_hand():
    found = kl_metrics([[[0.5, -0.1], [0.0, 0.2]]])
    assert found["kl"] == pytest.approx((0.4 + 0.2) / 2)
    k3 = [math.exp(-x) - 1 + x for x in (0.5, -0.1, 0.2)]
    assert found["kl_k3"] == pytest.approx(sum(k3) / 2)
    assert kl_metrics([[[-3.0]]])["kl"] == -3 and kl_metrics([[[-3.0]]])["kl_k3"] > 0


def test_the_gap_of_trainer_and_sampler_by_hand():
    found = sampler_metrics([said("x")], [[0.0, 0.0, 0.0, -1.1, -1.8]])
    assert found["kl_sample_train_v1"] == pytest.approx((0.1 - 0.2) / 2)
    assert found["kl_sample_train_v2"] == pytest.approx((0.01 + 0.04) / 4)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(0.2)


def test_samples_are_written_down_with_what_became_of_them():
    rows = sample_rows([[said("x"), said("y", stop="malformed")]], [[1.0, 0.0]], [[0.5, -0.5]])
    assert rows[1] == {
        "group": 0, "index": 1, "prompt": [{"role": "user", "content": "?"}], "completion": "y", "reward": 0.0,
        "advantage": -0.5, "tokens": 2, "stop_reason": "length",
    }  # fmt: skip
