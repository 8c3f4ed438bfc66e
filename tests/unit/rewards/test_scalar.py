from __future__ import annotations

import math
from concurrent.futures import Future

import pytest

from tercet.chat.answers import AnswerRenderer
from tercet.chat.renderers import renderer
from tercet.errors import TrainingError
from tercet.evaluation.judges import agreement
from tercet.evaluation.win_rate import win_rate
from tercet.models.load import load_tokenizer
from tercet.rewards.scalar import ScalarJudge, sigmoid
from tercet.types import Message


class LengthScorer:
    """Scores a sequence by how often `token` is in it, times ln 3."""

    def __init__(self, token):
        self.token, self.unit, self.asked = token, math.log(3), 0

    def scores(self, sequences):
        self.asked += len(sequences)
        future: Future[list[float]] = Future()
        future.set_result([self.unit * list(tokens).count(self.token) for tokens in sequences])
        return future

    def fingerprint(self):
        return "length"


@pytest.fixture
def judge():
    tokenizer = load_tokenizer("tiny")
    shown = AnswerRenderer(renderer("role_colon", tokenizer), limit=512)
    return ScalarJudge(LengthScorer(tokenizer.encode("q", add_special_tokens=False)[0]), shown)


def test_the_preference_is_the_sigmoid_of_the_difference(judge, compare):
    [a] = judge.probabilities([compare("q", "")])  # odds 3 to 1 for the first
    assert (a.a, a.b) == pytest.approx((0.75, 0.25))
    assert judge.margins([compare("q", ""), compare("", "q"), compare("q", "q")]) == pytest.approx([-0.5, 0.5, 0.0])


def test_an_answer_is_scored_once_however_often_it_is_shown(judge, compare):
    row = compare("q", "qq")
    judge.margins([row, row.swapped(), row])
    assert judge.scorer.asked == 2
    assert judge.scores([]) == []


def test_it_stands_where_a_judge_stands(judge, compare):
    found = agreement(judge, [compare("q", "", "A"), compare("q", "", "B"), compare("qq", "", "A")])
    assert (found.accuracy, found.accuracy_both, found.flip_rate) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 0.0)
    assert found.nll == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(10 / 9)) / 3)
    prompts = [(Message("user", "Well?"),)] * 2
    ours, theirs = ([(Message("assistant", each),) for each in two] for two in (("q", "a"), ("a", "q")))
    assert win_rate(judge, prompts, ours, theirs).win_rate == 0.5


def test_a_score_that_is_no_number_stops_everything(judge, compare):
    judge.scorer.unit = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        judge.margins([compare("q", "")])


def test_the_sigmoid_does_not_overflow():
    assert [sigmoid(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]
