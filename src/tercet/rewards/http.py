"""Rewards from a server: POST {"prompts": [...], "completions": [...]} -> {"rewards": [...]}."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tercet.errors import ConfigError, RewardError
from tercet.rewards.functions import checked_rewards
from tercet.rewards.interface import Candidate
from tercet.types import as_messages

# What may pass by itself: too many requests, and a server that is starting, busy or overtaxed.
PASSING = frozenset({408, 429, 500, 502, 503, 504})


class HTTPReward:
    """Asks a server, in requests of `batch_size` answers; a failing one is asked again, and then stops the run.

    Prompts and completions are lists of messages (role, content); columns of the data go along under their names.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        retries: int = 3,
        batch_size: int = 32,
        concurrency: int = 4,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Name the server.

        Args:
            url: Of http or https.
            timeout_s: How long an answer may take.
            retries: How often a request is made again.
            batch_size: Answers per request.
            concurrency: Requests at the same time.
            wait: Passes seconds between tries, 1, 2, 4 and so on.

        Raises:
            ConfigError: The address is of another kind.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the reward's url is {url!r}; it must begin with http:// or https://")
        self.url, self.timeout_s, self.retries = url, timeout_s, retries
        self.batch_size, self.concurrency, self.wait = batch_size, concurrency, wait

    def rewards(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """See `AnswerReward`; in the order of the answers, whichever request ends first."""
        parts = [candidates[at : at + self.batch_size] for at in range(0, len(candidates), self.batch_size)]
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            return [reward for part in pool.map(self._ask, parts) for reward in part]

    def _ask(self, candidates: Sequence[Candidate]) -> list[float | None]:
        names = sorted({name for each in candidates for name in each.columns})
        asked = {
            "prompts": [as_messages(each.prompt) for each in candidates],
            "completions": [as_messages(each.answer) for each in candidates],
            **{name: [each.columns.get(name) for each in candidates] for name in names},
        }
        said = self._post(json.dumps(asked).encode())
        try:
            found = json.loads(said)
        except ValueError as error:
            raise RewardError(f"{self.url} answered with something that is no JSON: {said[:80]!r}") from error
        if isinstance(found, dict):
            if "rewards" not in found:
                raise RewardError(f"{self.url} answered with {', '.join(found) or 'nothing'}; it must give 'rewards'")
            found = found["rewards"]
        return checked_rewards(found, len(candidates), self.url)

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    said: bytes = response.read()
                    return said
            except urllib.error.HTTPError as error:
                with error:
                    trouble, may_pass = f"{error.code} {error.reason}", error.code in PASSING
            except (OSError, http.client.HTTPException) as error:
                trouble, may_pass = str(error) or type(error).__name__, True
            if not may_pass:
                raise RewardError(f"the reward server at {self.url} refused the request: {trouble}")
            if attempt < self.retries:
                self.wait(2.0**attempt)
        raise RewardError(
            f"the reward server at {self.url} failed {self.retries + 1} times, at last with: {trouble}; when it is "
            "back, the same command goes on from the run's last checkpoint"
        )
