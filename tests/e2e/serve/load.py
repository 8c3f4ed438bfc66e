"""Many SDK clients at once against a server of `tiny`, one of them killed in the middle.

Every sample is compared with what the server drew for its prompt and seed when nobody else was there.

python tests/e2e/serve/load.py --clients 32 --requests 2000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS, MAX_TOKENS = 24, 32


def resident_mb(pid: int) -> float:
    """Memory of a process; NaN where it is not told."""
    status = Path(f"/proc/{pid}/status")
    return int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0]) / 1000 if status.exists() else math.nan


@dataclass
class Server:
    """A running server: its process, where it listens, and, once it has ended, what it said."""

    pid: int
    url: str
    said: str = ""

    @property
    def drawn(self) -> int:
        """How many requests to sample its engine answered."""
        return int(re.findall(r"(\d+) requests to sample were drawn", self.said)[0])


@contextmanager
def server(out: str, max_rows: int) -> Iterator[Server]:
    """A server of `tiny`."""
    words = ["serve", "--model", "tiny", "--threads", "1", "--port", "0", "--out", out, "--max-rows", str(max_rows)]
    command, environment = [sys.executable, "-m", "tercet.cli.main", *words], {**os.environ, "TINKER_API_KEY": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    url = next(found[1] for line in process.stdout if (found := re.search(r"TINKER_BASE_URL=(\S+)", line)))
    running = Server(process.pid, url)
    try:
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        running.said = process.stdout.read()
        process.wait()


class Client:
    """One client."""

    def __init__(self, url: str) -> None:
        import tinker

        self.service = tinker.ServiceClient(base_url=url, api_key="tml-local")
        self.sampler, self.types = self.service.create_sampling_client(base_model="tiny").result(), tinker.types

    def ask(self, number: int) -> Any:
        """The future of a sample; its prompt and seed are no other number's."""
        params = self.types.SamplingParams(max_tokens=MAX_TOKENS, seed=number, stop=[])
        tokens = [3 + number // 400 % 400, *[3 + number % 400] * (PROMPT_TOKENS - 1)]
        prompt = self.types.ModelInput.from_ints(tokens)
        return self.sampler.sample(prompt=prompt, num_samples=1, sampling_params=params)


def tokens_of(answer: Any) -> tuple[int, ...]:
    """Those of the only sample."""
    [sequence] = answer.sequences
    return tuple(sequence.tokens)


def alone(url: str, numbers: range) -> list[tuple[int, ...]]:
    """What each request gives when nothing else waits."""
    client = Client(url)
    found = [tokens_of(client.ask(number).result()) for number in numbers]
    client.service.close("success").result()
    return found


def load(running: Server, clients: int, each: int, wanted: list[tuple[int, ...]]) -> dict[str, Any]:
    """Everything at once; what came of it."""
    url, pid = running.url, running.pid
    command = [sys.executable, __file__, "--victim", url, "--requests", str(each)]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    victim.stdout.readline()  # it is asking now
    memory = [resident_mb(pid)]
    began = time.monotonic()
    living = [Client(url) for _ in range(clients - 1)]
    futures = [client.ask(i * each + k) for i, client in enumerate(living) for k in range(each)]
    victim.kill()
    victim.wait()
    answers = []
    for future in futures:
        answers.append(tokens_of(future.result()))
        memory.append(resident_mb(pid))
    seconds = time.monotonic() - began
    for client in living:
        client.service.close("success").result()
    return {
        "clients": clients,
        "asked": len(futures),
        "answered": len(answers),
        "as_if_alone": sum(found == own for found, own in zip(answers, wanted, strict=True)),
        "different_samples": len(set(answers)),
        "seconds": round(seconds, 1),
        "samples_per_s": round(len(answers) / seconds, 1),
        "memory_mb_first_most_and_last": [round(each, 1) for each in (memory[0], max(memory), memory[-1])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1, help="the same several times, to see whether memory grows")
    parser.add_argument("--max-rows", type=int, default=128, help="as of `tercet serve`: few rows, few kernels kept")
    parser.add_argument("--victim", help="be the client that is killed, at this URL")
    asked = parser.parse_args()
    if asked.victim:
        client = Client(asked.victim)
        futures = [client.ask(1_000_000 + number) for number in range(asked.requests)]
        print("asking", flush=True)
        for future in futures:
            future.result()
        time.sleep(600)
    each = asked.requests // asked.clients
    with tempfile.TemporaryDirectory() as out, server(out, asked.max_rows) as running:
        wanted = alone(running.url, range((asked.clients - 1) * each))
        for _ in range(asked.rounds):
            print(json.dumps(load(running, asked.clients, each, wanted)), flush=True)
    # Once alone and once a round, and of the killed clients what was begun.
    least = (asked.rounds + 1) * len(wanted)
    drawn = {"drawn": running.drawn, "drawn_at_least": least, "drawn_at_most": least + asked.rounds * each}
    print(json.dumps(drawn), flush=True)


if __name__ == "__main__":
    main()
