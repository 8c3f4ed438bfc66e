"""Many SDK clients at once against a server of `tiny`, one of them killed in the middle.

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
from pathlib import Path
from typing import Any

PROMPT_TOKENS, MAX_TOKENS = 24, 32


def resident_mb(pid: int) -> float:
    """Memory of a process; NaN where it is not told."""
    status = Path(f"/proc/{pid}/status")
    return int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0]) / 1000 if status.exists() else math.nan


@contextmanager
def server(out: str) -> Iterator[tuple[int, str]]:
    """A server of `tiny`: its process and where it listens."""
    words = ["serve", "--model", "tiny", "--threads", "1", "--port", "0", "--out", out]
    command, environment = [sys.executable, "-m", "tercet.cli.main", *words], {**os.environ, "TINKER_API_KEY": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"TINKER_BASE_URL=(\S+)", line):
                yield process.pid, found[1]
                break
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def ask(url: str, first: int, requests: int) -> list[Any]:
    """One client's requests, sent at once; their futures. Prompt and seed tell each from all others."""
    import tinker

    sampler = tinker.ServiceClient(base_url=url, api_key="tml-local").create_sampling_client(base_model="tiny").result()
    params = [tinker.types.SamplingParams(max_tokens=MAX_TOKENS, seed=first + i, stop=[]) for i in range(requests)]
    prompts = [[3 + (first + i) // 400 % 400, *[3 + (first + i) % 400] * (PROMPT_TOKENS - 1)] for i in range(requests)]
    return [
        sampler.sample(prompt=tinker.types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=each)
        for prompt, each in zip(prompts, params, strict=True)
    ]


def load(url: str, pid: int, clients: int, requests: int) -> dict[str, Any]:
    """Everything at once; what came of it."""
    each = requests // clients
    command = [sys.executable, __file__, "--victim", url, "--requests", str(each)]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    victim.stdout.readline()  # it is asking now
    memory = [resident_mb(pid)]
    began = time.monotonic()
    futures = [future for client in range(clients - 1) for future in ask(url, client * each, each)]
    victim.kill()
    victim.wait()
    answers = []
    for future in futures:
        answers.append(future.result())
        memory.append(resident_mb(pid))
    seconds = time.monotonic() - began
    tokens = {tuple(sequence.tokens) for answer in answers for sequence in answer.sequences}
    return {
        "clients": clients,
        "asked": len(futures),
        "answered": len(answers),
        "whole": sum(len(each) == MAX_TOKENS for each in tokens),
        "different_samples": len(tokens),
        "seconds": round(seconds, 1),
        "samples_per_s": round(len(answers) / seconds, 1),
        "memory_mb_first_most_and_last": [round(each, 1) for each in (memory[0], max(memory), memory[-1])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1, help="the same several times, to see whether memory grows")
    parser.add_argument("--victim", help="be the client that is killed, at this URL")
    asked = parser.parse_args()
    if asked.victim:
        futures = ask(asked.victim, 1_000_000, asked.requests)
        print("asking", flush=True)
        for future in futures:
            future.result()
        time.sleep(600)
    with tempfile.TemporaryDirectory() as out, server(out) as (pid, url):
        for _ in range(asked.rounds):
            print(json.dumps(load(url, pid, asked.clients, asked.requests)), flush=True)


if __name__ == "__main__":
    main()
