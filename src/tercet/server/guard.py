"""Who may come in, and how much may be brought: looked at before anything else is."""

from __future__ import annotations

import hmac
import ipaddress
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Only data to learn from are large; what else is sent is JSON, which takes several times its size once it is read.
LARGE, JSON_BYTES = "/forward_backward", 16_000_000


class Guard:
    """ASGI middleware: a token, this machine only, and a limit for bodies."""

    def __init__(self, app: ASGIApp, *, token: str | None, local_only: bool, most_bytes: int) -> None:
        self.app, self.token, self.local_only, self.most_bytes = app, token, local_only, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        most = self.most_bytes if scope["path"].endswith(LARGE) else min(self.most_bytes, JSON_BYTES)
        refused = self._refusal(headers, most)
        if refused is not None:
            await _say(send, *refused)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(*_too_large(most))
            return message

        await self.app(scope, counted, send)

    def _refusal(self, headers: dict[str, str], most: int) -> tuple[int, str] | None:
        if self.token is not None:
            given = headers.get("x-api-key", "") or headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return 401, "the key is not this server's token; set TINKER_API_KEY to the one it was started with"
        # A web page in this machine's browser can reach the loopback too; programs send no Origin, and name the host.
        if "origin" in headers:
            return 403, "requests from web pages are not taken"
        if self.local_only and not is_loopback(_host(headers.get("host", ""))):
            return 403, f"this server is for this machine; it was asked as {headers.get('host', '')!r}"
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > most:
            return _too_large(most)
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """A Host header without its port: `127.0.0.1:80`, `[::1]:80`, `localhost`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _too_large(most: int) -> tuple[int, str]:
    known = "only forward_backward's may be" if most == JSON_BYTES else "send it in pieces, or raise --limits.body-mb"
    return 413, f"the body is larger than {most // 1_000_000} MB; {known}"


async def _say(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    start: dict[str, Any] = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
