"""How a server ends while its engine, which nobody can interrupt, has work for minutes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.asking import sample

pytest.importorskip("tinker")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_that_is_in_the_middle_of_a_long_call(tmp_path: Path, number: signal.Signals):
    from tests.e2e.serve.serving import Server

    # A Python of its own: how that ends is what is looked at.
    words = ["serve", "--model", "tiny", "--threads", "1", "--port", "0", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "tercet.cli.main", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline() + process.stdout.readline()
    found = re.search(r"TINKER_BASE_URL=(\S+) ", said)
    assert found is not None
    started: Any = None
    server = Server(started, found[1], "tml-local")
    try:
        _, session = server.ask("POST", "/api/v1/create_session", {"sdk_version": "0.38.0"})
        client = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": "tiny"}
        _, sampler = server.ask("POST", "/api/v1/create_sampling_session", client)
        # A million tokens, which nothing ends before the context does: a minute's work.
        long = {"num_samples": 1024, "sampling_params": {"max_tokens": 1000, "stop": []}}
        server.ask("POST", "/api/v1/asample", sample(sampler["sampling_session_id"], 0, [40], **long))
        time.sleep(1)  # by now the engine draws: nothing is gathered for as long as that
        process.send_signal(number)
        said, _ = process.communicate(timeout=40)  # 3 s for answers on their way, 3 s for the engine, and some
    finally:
        process.kill()
        process.wait()
    if number == signal.SIGINT:
        assert process.returncode == 0 and "stopped; saved checkpoints are in" in said
    else:
        assert process.returncode == -signal.SIGTERM
