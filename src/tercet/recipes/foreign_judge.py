"""A model behind an OpenAI-compatible server as a judge of two answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tercet.errors import RewardError
from tercet.recipes.foreign import ForeignModel
from tercet.rewards.judge import LabelProbabilities, Verdict
from tercet.types import Comparison, Conversation

TASK = (
    "You are shown a conversation and two answers to its last turn. Judge which answer serves the user better: whether "
    "it does what was asked, is right, is clear, and is no longer than it needs to be. Neither the order of the "
    "answers nor their length is a reason."
)
ENDINGS: dict[Verdict, str] = {
    "soft": "Which answer is better? Reply with one letter, A or B, and nothing else.",
    "hard": "Which answer is better? Give your reasons in brief, and end with [[A]], [[B]], or, if they are equally "
    "good, [[C]].",
}
LONGEST: dict[Verdict, int] = {"soft": 1, "hard": 1024}
READABLE_SHARE = 0.9
"""With fewer verdicts than this that can be read, the judge is of no use."""
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


class EndpointJudge:
    """Stands wherever a judge stands.

    With `verdict="soft"` it reads the probabilities that the server gives the letters A and B as the first token of
    the reply; with `"hard"` the model may give reasons, and the last of [[A]], [[B]] and [[C]] counts. A verdict that
    cannot be read is a tie, and counted in `unreadable`.
    """

    def __init__(self, model: ForeignModel, *, verdict: Verdict = "soft", concurrency: int = 4) -> None:
        """Take a server's model, and say how its verdict is read and how many requests are made at the same time."""
        self.model, self.verdict, self.concurrency = model, verdict, concurrency
        self.asked = self.unreadable = 0

    def margins(self, comparisons: Sequence[Comparison]) -> list[float]:
        """How much the answer shown second is preferred, in [-1, 1]."""
        return [probabilities.margin for probabilities in self.probabilities(comparisons)]

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[LabelProbabilities]:
        """The probabilities of both labels, each comparison as it is shown.

        Raises:
            TercetError: The server fails.
            RewardError: More than a tenth of its verdicts cannot be read, or it gives no log-probs.
        """
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            choices = list(pool.map(self._ask, comparisons))
        found = [self._read(choice) for choice in choices]
        self.asked += len(found)
        self.unreadable += found.count(None)
        if self.asked - self.unreadable < READABLE_SHARE * self.asked:
            words = choices[found.index(None)]["message"]["content"] if None in found else ""
            raise RewardError(
                f"{self.unreadable} of {self.asked} verdicts of {self.model.model} cannot be read, as {words!r:.80}; "
                "take a model that keeps to the form, or --endpoint-verdict hard"
            )
        return [LabelProbabilities(0.5, 0.5) if each is None else each for each in found]

    def _ask(self, comparison: Comparison) -> dict[str, Any]:
        asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": LONGEST[self.verdict], "seed": 0}
        if self.verdict == "soft":
            asked |= {"logprobs": True, "top_logprobs": 20}
        shown = [
            {"role": "system", "content": TASK},
            {"role": "user", "content": f"{_shown(comparison)}\n\n{ENDINGS[self.verdict]}"},
        ]
        [choice] = self.model.complete(shown, 1, **asked)
        return choice

    def _read(self, choice: dict[str, Any]) -> LabelProbabilities | None:
        if self.verdict == "hard":
            verdicts = _VERDICT.findall(choice["message"]["content"] or "")
            return {"A": LabelProbabilities(1.0, 0.0), "B": LabelProbabilities(0.0, 1.0),
                    "C": LabelProbabilities(0.5, 0.5), None: None}[verdicts[-1] if verdicts else None]  # fmt: skip
        try:
            likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
            said = [(each["token"].strip(), math.exp(each["logprob"])) for each in likeliest]
        except (KeyError, TypeError, IndexError) as error:
            raise RewardError(
                f"{self.model.url} gives no top_logprobs; take --endpoint-verdict hard, which reads the reply's text"
            ) from error
        a, b = (math.fsum(p for token, p in said if token == label) for label in ("A", "B"))
        return LabelProbabilities(a, b) if a + b > 0 else None


def _shown(comparison: Comparison) -> str:
    return "\n\n".join(
        [
            "==== Conversation ====",
            _written(comparison.prompt),
            "==== Answer A ====",
            _written(comparison.a),
            "==== Answer B ====",
            _written(comparison.b),
            "==== End ====",
        ]
    )


def _written(turns: Conversation) -> str:
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)
