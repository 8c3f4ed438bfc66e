"""The server as a process: a socket, and an end that lets the last answers out."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from tercet.errors import UsageError
from tercet.server.app import make_app
from tercet.server.served import NO_TOKEN, Limits, Served
from tercet.server.service import Service
from tercet.server.store import Store

# A thousand requests may come at once, each with a connection of its own.
BACKLOG = 4096
# A client takes a connection up again for 5 s at most; each that waits here costs tens of KB.
KEEP_ALIVE_S = 15
# What is being answered may end, and then what the engine does: a save, mostly.
GRACE_S = 3


def listen(
    served: Served,
    root: Path,
    limits: Limits,
    *,
    host: str,
    port: int,
    token: str | None,
    local_only: bool,
    say: Callable[[str], None],
) -> None:
    """Serve until interrupted.

    Args:
        served: The model.
        root: Folder of checkpoints.
        limits: How much clients may ask for.
        host: Where to listen.
        port: Where to listen; 0 takes a free one.
        token: What clients must give; None asks for nothing.
        local_only: Whether only programs of this machine are meant.
        say: Told where it listens.

    Raises:
        UsageError: The address cannot be listened on.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error}; give another --port, or 0 for a free one"
        ) from error
    port = listening.getsockname()[1]
    service = Service(served, Store(root), limits)
    app = make_app(service, token=token, local_only=local_only)
    where = f"[{host}]" if ":" in host else host
    say(f"names: {', '.join(served.names)}; checkpoints in {root}")
    key = f"TINKER_API_KEY={NO_TOKEN}" if token is None else "and TINKER_API_KEY as it was given"
    say(f"serving: TINKER_BASE_URL=http://{where}:{port} {key}")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        backlog=BACKLOG,
    )
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:
        say(f"stopped; saved checkpoints are in {root}, and a server started there again serves them")
        say(f"{service.schedule.drawn} requests to sample were drawn in {service.schedule.calls} calls of the engine")
        try:
            rests = service.schedule.rests_within(GRACE_S)
        except KeyboardInterrupt:  # who cannot wait
            rests = False
        if not rests:
            # Python would wait for the engine's thread, which may draw for hours yet.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
