"""A server that speaks the part of OpenAI's protocol that judges need; what it says depends on what it is asked."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], str | Mapping[str, float]]
"""From the words of the last message to the answer's words, which come without log-probs, or to the probabilities of
its only token."""


@dataclass
class Served:
    """A server that is running, and every request that came."""

    address: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def openai_server(reply: Reply) -> Iterator[Served]:
    """Answer POST …/chat/completions until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(asked)
            said = reply(asked["messages"][-1]["content"])
            if isinstance(said, str):
                words, logprobs = said, None
            else:
                words = max(said, key=lambda token: said[token])
                top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in said.items()]
                logprobs = {"content": [{**top[0], "token": words, "top_logprobs": top}]}
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": words},
                "finish_reason": "stop",
                "logprobs": logprobs,
            }
            body = json.dumps({
                "id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
