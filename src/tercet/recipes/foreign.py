"""A model behind an OpenAI-compatible server: text in, text out."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from tercet.data.groups import Sampled
from tercet.errors import TercetError, UsageError
from tercet.types import Conversation, as_messages

TRIES = 4
PASSING = frozenset({408, 429, 500, 502, 503, 504})


class ForeignModel:
    """Answers prompts over POST …/chat/completions. What passes by itself is tried again after 1, 2 and 4 seconds."""

    def __init__(self, endpoint: str, model: str, *, timeout_s: float = 120.0) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise UsageError(f"the endpoint is {endpoint!r}; it must begin with http:// or https:// and end in /v1")
        self.url, self.model, self.timeout_s = f"{endpoint.rstrip('/')}/chat/completions", model, timeout_s

    def answers(
        self, prompt: Conversation, n: int, *, temperature: float, top_p: float, max_tokens: int, seed: int
    ) -> list[Sampled]:
        """Draw `n` answers; their tokens are the server's own and are not known here.

        Raises:
            TercetError: The server fails, or answers something else.
        """
        choices = self.complete(
            as_messages(prompt), n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed
        )
        return [
            Sampled(
                each["message"]["content"] or "", stop_reason="length" if each["finish_reason"] == "length" else "stop"
            )
            for each in choices
        ]

    def complete(self, messages: Sequence[Mapping[str, str]], n: int, **settings: object) -> list[dict[str, Any]]:
        """The `choices` of a chat completion.

        Args:
            messages: Turns.
            n: How many choices.
            settings: Of the protocol: temperature, max_tokens, logprobs and the like.

        Raises:
            TercetError: The server fails, or answers something else.
        """
        said = self._post({"model": self.model, "messages": list(messages), "n": n, **settings})
        try:
            choices = [
                {**each, "message": {"content": each["message"]["content"]}, "finish_reason": each.get("finish_reason")}
                for each in said["choices"]
            ]
        except (KeyError, TypeError) as error:
            raise TercetError(f"{self.url} answered something that is no chat completion: {str(said)[:200]}") from error
        if len(choices) != n:
            raise TercetError(
                f"{self.url} gave {len(choices)} answers, and {n} were asked for; take a server that has n"
            )
        return choices

    def _post(self, asked: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if "OPENAI_API_KEY" in os.environ:
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:200]
                if error.code not in PASSING or attempt == TRIES - 1:
                    raise TercetError(f"{self.url} answered {error.code}: {said}") from error
            except (OSError, ValueError) as error:
                if attempt == TRIES - 1:
                    raise TercetError(f"{self.url} cannot be asked: {error}; is the server up?") from error
            time.sleep(2**attempt)
        raise AssertionError("every try returns or raises")
