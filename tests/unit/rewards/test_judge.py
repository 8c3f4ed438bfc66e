from __future__ import annotations

import math

import pytest
import torch

from tercet.engine.fake import FakeEngine
from tercet.errors import TrainingError
from tercet.rewards.judge import Judge, LabelProbabilities


def opinion(first, second):
    """Sure of better answers, a little in favour of the second place, one fifth undecided."""
    better = (second == "good") - (first == "good")
    return 0.4 - 0.3 * better - 0.05, 0.4 + 0.3 * better + 0.05


def test_the_margin_is_p_b_minus_p_a(judge_of, compare):
    judge = judge_of(opinion)
    comparisons = [compare("good", "bad"), compare("bad", "good"), compare("good", "good")]
    assert judge.margins(comparisons) == pytest.approx([-0.5, 0.7, 0.1])
    assert judge.probabilities(comparisons)[0] == LabelProbabilities(pytest.approx(0.65), pytest.approx(0.15))


def test_shares_are_of_the_two_labels_alone():
    assert LabelProbabilities(0.6, 0.2).a_share == pytest.approx(0.75)
    assert LabelProbabilities(0.0, 0.0).a_share == 0.5


def test_a_hard_verdict_is_one_greedy_letter(judge_of, compare):
    judge = judge_of(lambda a, b: {"x": (0.7, 0.2), "y": (0.2, 0.7), "z": (0.1, 0.2)}[a], verdict="hard")
    assert judge.margins([compare("x", "."), compare("y", "."), compare("z", ".")]) == [-1.0, 1.0, 0.0]


def test_a_hard_verdict_that_is_no_label_counts_as_a_tie(shown, compare):
    vocabulary = len(shown.renderer.tokenizer)
    sampler = FakeEngine(vocabulary=vocabulary, context_tokens=512).sampler()  # greedy: token 0, which is no label
    assert Judge(sampler, shown, verdict="hard").margins([compare("good", "bad")]) == [0.0]


def test_probabilities_that_are_not_numbers_are_refused(judge_of, compare):
    with pytest.raises(TrainingError, match="not finite"):
        judge_of(lambda a, b: (math.nan, 0.5)).margins([compare("good", "bad")])


def test_an_engine_gives_the_label_probabilities_of_its_model(shown, compare):
    vocabulary = len(shown.renderer.tokenizer)
    last = shown.prompt(compare("good", "bad"))[-1]
    logits = torch.full((vocabulary, vocabulary), -20.0)
    logits[last, shown.labels["A"]], logits[last, shown.labels["B"]] = math.log(0.3), math.log(0.6)
    logits[last, shown.labels["Tie"]] = math.log(0.1)
    judge = Judge(FakeEngine(vocabulary=vocabulary, logits=logits, context_tokens=512).sampler(), shown)
    found = judge.probabilities([compare("good", "bad"), compare("bad", "good")])
    assert [(p.a, p.b) for p in found] == [(pytest.approx(0.3, rel=1e-4), pytest.approx(0.6, rel=1e-4))] * 2


def test_no_comparisons_give_no_margins(judge_of):
    assert judge_of(opinion).margins([]) == []
