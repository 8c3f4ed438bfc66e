from __future__ import annotations

import pytest

from tercet.errors import RewardError
from tercet.evaluation.judges import agreement
from tercet.evaluation.win_rate import win_rate
from tercet.recipes.foreign import ForeignModel
from tercet.recipes.foreign_judge import EndpointJudge
from tests.openai_server import openai_server


def answers_in(words: str) -> tuple[str, str]:
    a, _, rest = words.partition("==== Answer A ====\n\nAssistant: ")[2].partition("\n\n==== Answer B ====")
    return a, rest.partition("Assistant: ")[2].partition("\n\n==== End ====")[0]


def longer(words: str) -> dict[str, float]:
    a, b = answers_in(words)
    return {"A": 0.75, " B": 0.25} if len(a) > len(b) else {"A": 0.2, "B": 0.5, " B": 0.1, "C": 0.2}


def test_the_letters_probabilities_are_the_verdict(compare):
    with openai_server(longer) as server:
        judge = EndpointJudge(ForeignModel(server.address, "m"))
        found = judge.probabilities([compare("long answer", "short"), compare("x", "longer")])
    assert (found[0].a, found[0].b) == (pytest.approx(0.75), pytest.approx(0.25))
    # With and without a space before it, it is one letter.
    assert (found[1].a, found[1].b) == (pytest.approx(0.2), pytest.approx(0.6))
    asked = server.requests[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["top_logprobs"]) == ("m", 1, 0.0, 20)
    assert (judge.asked, judge.unreadable) == (2, 0)


def test_the_last_letter_in_brackets_is_the_hard_verdict(compare):
    def reasons(words: str) -> str:
        a, b = answers_in(words)
        return "The form is [[A]] or [[B]]. " + (
            "[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"
        )

    with openai_server(reasons) as server:
        judge = EndpointJudge(ForeignModel(server.address, "m"), verdict="hard")
        assert judge.margins([compare("aa", "b"), compare("a", "bb"), compare("a", "b")]) == [-1, 1, 0]
        assert "logprobs" not in server.requests[0]
        ours, theirs = [compare("aaa", "b").a], [compare("b", "a").a]
        assert win_rate(judge, [compare("a", "b").prompt], ours, theirs).win_rate == 1
        assert agreement(judge, [compare("aa", "b", "A"), compare("a", "bb", "A")]).accuracy == 0.5


def test_a_few_verdicts_that_cannot_be_read_are_ties_and_counted_and_many_are_refused(compare):
    def mumbles(words: str) -> dict[str, float]:
        return {"I": 1.0} if "mumble" in words else {"A": 0.9, "B": 0.1}

    with openai_server(mumbles) as server:
        judge = EndpointJudge(ForeignModel(server.address, "m"))
        margins = judge.margins([compare("fine", "x")] * 9 + [compare("mumble", "x")])
        assert margins[-1] == 0 and margins[0] == pytest.approx(-0.8)
        assert (judge.asked, judge.unreadable) == (10, 1)
        with pytest.raises(RewardError, match="2 of 11 verdicts of m cannot be read, as 'I'"):
            judge.margins([compare("mumble", "x")])


def test_a_server_without_log_probs_is_told_from_one_that_mumbles(compare):
    with (
        openai_server(lambda words: "A") as server,
        pytest.raises(RewardError, match="gives no top_logprobs; take --endpoint-verdict hard"),
    ):
        EndpointJudge(ForeignModel(server.address, "m")).margins([compare("a", "b")])
