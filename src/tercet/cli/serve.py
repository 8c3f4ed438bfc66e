"""`tercet serve`: the Tinker protocol on this machine's engine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

from tercet.cli.closing import say
from tercet.config import parse
from tercet.errors import CheckpointError, ConfigError, UsageError
from tercet.recipes.session import MachineConfig, SetupConfig, local_engine
from tercet.server.served import NO_TOKEN, Limits, Served


@dataclass(frozen=True, kw_only=True)
class ServeConfig(MachineConfig):
    """Serve one base model to programs written for the Tinker service."""

    model: str = "smollm2-135m"
    """The base model: smollm2-135m, tiny, a local directory, or a hub id."""
    alias: tuple[str, ...] = ()
    """More names for it, as NAME=MODEL: what clients may ask for when their own table of models is closed."""
    host: str = "127.0.0.1"
    """Where to listen; beyond this machine a token is required."""
    port: int = 8000
    """Where to listen; 0 takes a free one."""
    token: str | None = None
    """What clients must give as TINKER_API_KEY; by default what that variable says here. It begins with tml-: the SDK
    refuses other keys, but for tokens of the hosted service (eyJ...)."""
    out: str = "runs/serve"
    """Folder of checkpoints; they outlive sessions and restarts."""
    micro_batch_tokens: int = 2048
    """Tokens, after merging prefixes, of one pass with gradient; lower it when memory is short."""
    limits: Limits = field(default_factory=Limits)
    """How much clients may ask for."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535")
        _check_token("token", self.token)


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(ServeConfig, argv, prog="tercet serve")
    absent = [name for name in ("fastapi", "uvicorn", "google.protobuf") if importlib.util.find_spec(name) is None]
    if absent:
        raise UsageError(f"{', '.join(absent)} is not installed, which serving needs: pip install 'tercet[server]'")
    from tercet.server.guard import is_loopback
    from tercet.server.listening import listen

    token = config.token or _token_of_environment()
    local = is_loopback(config.host)
    if token is None and not local:
        raise UsageError(
            f"listening on {config.host} lets other machines in, so a token is required: TINKER_API_KEY=tml-… in the "
            'environment, or --token (for example one from: python -c \'import secrets; print("tml-" + '
            "secrets.token_urlsafe(24))')"
        )
    out = Path(config.out)
    held = _taken(out)
    try:
        listen(
            open_served(config), out, config.limits, host=config.host, port=config.port, token=token,
            local_only=local and token is None, say=say,
        )  # fmt: skip
    finally:
        os.close(held)
    return 0


def _taken(out: Path) -> int:
    # A second server would take what the first one is writing for the remains of a killed one.
    from tercet.runs.lock import lock

    out.mkdir(parents=True, exist_ok=True)
    try:
        return lock(out)
    except UsageError as error:
        raise CheckpointError(f"one server at a time may write checkpoints: {error}") from error


def _token_of_environment() -> str | None:
    # Whoever is on the machine sees a command's words, but not its environment.
    token = os.environ.get("TINKER_API_KEY")
    if not token or token == NO_TOKEN:
        return None
    _check_token("TINKER_API_KEY", token)
    return token


def _check_token(name: str, token: str | None) -> None:
    if token is not None and (not token.startswith("tml-") or len(token) < 12):
        raise ConfigError(
            f"{name} must begin with tml- and have 12 characters or more: the SDK refuses other keys, but for those "
            "that begin with eyJ, which are the hosted service's own and run out; give this server one of its own"
        )


def open_served(config: ServeConfig) -> Served:
    """The base model in an engine, and the names it goes by.

    Raises:
        UsageError: An alias is not NAME=MODEL, or means another model.
    """
    from tercet.models.names import resolve

    setup = SetupConfig(
        model=config.model, device=config.device, dtype=config.dtype, threads=config.threads, max_rows=config.max_rows,
        trust_remote_code=config.trust_remote_code, seed=config.seed, micro_batch_tokens=config.micro_batch_tokens,
    )  # fmt: skip
    aliases = []
    for alias in config.alias:
        name, equals, target = alias.partition("=")
        if not (name and equals and target):
            raise UsageError(f"alias {alias!r} is not NAME=MODEL, as in --alias Qwen/Qwen3-8B-Base={config.model}")
        if target != config.model and resolve(target).resolve() != resolve(config.model).resolve():
            raise UsageError(
                f"alias {alias!r} means {target}, but this server serves {config.model}; start another one"
            )
        aliases.append(name)
    engine = local_engine(setup)
    loaded = engine.loaded
    return Served(
        engine=engine,
        name=config.model,
        names=tuple(dict.fromkeys([config.model, *aliases])),
        tokenizer=loaded.path.resolve(),
        vocabulary=engine.body(loaded.model).head.out_features,
        architecture=str(loaded.model.config.model_type),
    )
