"""Functions, servers, sums and tournaments as rewards."""

from __future__ import annotations

import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tercet.errors import ConfigError, RewardError, UsageError
from tercet.rewards.combined import WeightedSum
from tercet.rewards.functions import FunctionReward, load_function
from tercet.rewards.http import HTTPReward
from tercet.rewards.interface import Candidate, Each
from tercet.rewards.meeting import Tournament
from tercet.rewards.scalar import RewardJudge, ScalarReward
from tercet.types import Comparison, Message


def candidate(answer, prompt="Well?", **columns):
    return Candidate((Message("user", prompt),), (Message("assistant", answer),), columns)


ANSWERS = [candidate("a"), candidate("bbb"), candidate("cc")]


def lengths(prompts, completions):
    return [float(len(completion)) for completion in completions]


def test_a_function_is_given_messages_or_text():
    seen = []

    def look(prompts, completions):
        seen.append((prompts, completions))
        return [1] * len(prompts)

    assert FunctionReward(look).rewards(ANSWERS[:1]) == [1.0]
    FunctionReward(look, shows="text").rewards(ANSWERS[:1])
    messages = ([[{"role": "user", "content": "Well?"}]], [[{"role": "assistant", "content": "a"}]])
    assert seen == [messages, (["Well?"], ["a"])]


def test_a_function_is_given_the_columns_it_takes():
    def some(prompts, completions, target):
        return [float(t) for t in target]

    def every(prompts, completions, **columns):
        assert columns == {"other": ["x", None], "target": [1, 2]}
        return [0.0, None]

    rows = [candidate("a", target=1, other="x"), candidate("b", target=2)]
    assert FunctionReward(some).rewards(rows) == [1.0, 2.0]
    assert FunctionReward(every).rewards(rows) == [0.0, None]


def test_an_async_function_is_waited_for():
    async def slow(prompts, completions):
        return [2.0 for _ in completions]

    assert FunctionReward(slow).rewards(ANSWERS) == [2.0] * 3


@pytest.mark.parametrize(("found", "message"), [
    ([1.0], "1 rewards for 3 answers"), (None, "None for 3 answers"), ([1.0, float("nan"), 0.0], "nan for answer 1"),
    ([1.0, "2", 0.0], "'2' for answer 1"), ("abc", "'abc' for 3 answers"),
])  # fmt: skip
def test_anything_but_a_number_for_each_answer_is_an_error(found, message):
    def broken(prompts, completions):
        return found

    with pytest.raises(RewardError, match=f"the reward function broken gave {message}"):
        FunctionReward(broken).rewards(ANSWERS)


def test_a_function_is_found_in_a_file_and_in_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def one(prompts, completions):\n    return [1.0] * len(prompts)\n")
    assert FunctionReward(load_function(f"{tmp_path}/mine.py:one")).rewards(ANSWERS) == [1.0] * 3
    assert load_function("json:dumps") is json.dumps
    for place, message in (
        ("mine", "file.py:name"), (f"{tmp_path}/mine.py:two", "no function 'two'"), ("no_such.thing:f", "cannot be"),
        (f"{tmp_path}/none.py:one", "there is no file"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            load_function(place)


class Server:
    """A reward server that gives every answer its length, after the troubles it is told to make."""

    def __init__(self, *troubles):
        self.troubles, self.asked = deque(troubles), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(asked)
                trouble = outer.troubles.popleft() if outer.troubles else 200
                rewards = [float(len(each[0]["content"])) for each in asked["completions"]]
                body = trouble if isinstance(trouble, bytes) else json.dumps({"rewards": rewards}).encode()
                self.send_response(trouble if isinstance(trouble, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_a_server_is_asked_in_requests_and_the_order_is_kept():
    rows = [candidate("x" * n, target=n) for n in range(1, 12)]
    with Server() as server:
        found = HTTPReward(server.url, batch_size=3, concurrency=4).rewards(rows)
    assert found == [float(n) for n in range(1, 12)]
    assert sorted(len(asked["prompts"]) for asked in server.asked) == [2, 3, 3, 3]
    first = next(asked for asked in server.asked if asked["target"][0] == 1)
    assert first["prompts"][0] == [{"role": "user", "content": "Well?"}] and first["target"] == [1, 2, 3]


def test_a_passing_trouble_is_waited_out():
    waited = []
    with Server(503, 429) as server:
        assert HTTPReward(server.url, retries=2, wait=waited.append).rewards(ANSWERS) == [1.0, 3.0, 2.0]
    assert waited == [1.0, 2.0]


@pytest.mark.parametrize(("troubles", "message", "requests"), [
    ([503, 503, 503], "failed 3 times, at last with: 503", 3),
    ([404], "refused the request: 404", 1),
    ([b"oh no"], "something that is no JSON", 1),
    ([b'{"scores": [1]}'], "answered with scores; it must give 'rewards'", 1),
    ([b'{"rewards": [1, 2]}'], "2 rewards for 3 answers", 1),
])  # fmt: skip
def test_a_server_that_fails_stops_the_run_with_a_clear_error(troubles, message, requests):
    with Server(*troubles) as server, pytest.raises(RewardError, match=message):
        HTTPReward(server.url, retries=2, wait=lambda seconds: None).rewards(ANSWERS)
    assert len(server.asked) == requests


def test_a_server_that_is_not_there_or_too_slow_is_an_error():
    with Server() as server:
        gone = server.url
    with pytest.raises(RewardError, match="failed 2 times"):
        HTTPReward(gone, retries=1, wait=lambda seconds: None).rewards(ANSWERS)
    with pytest.raises(ConfigError, match="must begin with http"):
        HTTPReward("ftp://x")


def test_a_sum_weighs_the_sources_that_apply():
    def picky(prompts, completions):
        return [None if completion == "a" else 10.0 for completion in completions]

    both = WeightedSum({
        "length": (Each(FunctionReward(lengths, shows="text")), 0.5),
        "picky": (Each(FunctionReward(picky, shows="text")), 2.0),
    })  # fmt: skip
    assert both.group_rewards([ANSWERS[:2], ANSWERS[2:]]) == [[0.5, 21.5], [21.0]]


def test_an_answer_without_any_reward_and_a_run_without_a_source_are_errors():
    def never(prompts, completions):
        return [None] * len(prompts)

    with pytest.raises(RewardError, match=r"no reward \(never\) applies to the answer 'a'"):
        WeightedSum({"never": (Each(FunctionReward(never)), 1.0)}).group_rewards([ANSWERS])
    with pytest.raises(UsageError, match="there is no reward"):
        WeightedSum({})


def test_a_tournament_rewards_the_answers_of_a_group_among_each_other():
    by_length = RewardJudge(FunctionReward(lambda prompts, completions: [99.0 * len(c) for c in completions],
                                           shows="text"))  # fmt: skip
    assert Tournament(by_length).group_rewards([ANSWERS, ANSWERS[::-1]]) == [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]


def test_any_reward_compares_answers():
    judge = RewardJudge(FunctionReward(lengths, shows="text"))
    row = Comparison(ANSWERS[0].prompt, ANSWERS[0].answer, ANSWERS[1].answer)
    assert judge.margins([row])[0] == pytest.approx(-judge.margins([row.swapped()])[0])
    assert judge.margins([row])[0] == pytest.approx(2 / (1 + 2.718281828459045**-2) - 1)


def test_a_reward_models_scores_are_shifted_and_scaled():
    class Scores:
        def scores(self, pairs):
            return [float(len(answer[0].content)) for _, answer in pairs]

    assert ScalarReward(Scores(), mean=1.0, std=2.0).rewards(ANSWERS) == [0.0, 1.0, 0.5]
