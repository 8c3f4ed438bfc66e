"""What a server serves, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.engine.base import Engine
from tercet.errors import ConfigError, UsageError

# What clients are told to give where nothing is asked for: the SDK wants a key.
NO_TOKEN = "tml-local"


@dataclass(frozen=True)
class Served:
    """One base model in an engine."""

    engine: Engine
    name: str
    """As `--model` was given."""
    names: tuple[str, ...]
    """What clients may call it; every one means the same weights."""
    tokenizer: Path
    """The directory that holds its tokenizer."""
    vocabulary: int
    """How many tokens it knows."""
    architecture: str = "unknown"

    @property
    def weights(self) -> str:
        """The model itself, however `--model` spells it: a directory has one whole path."""
        directory = Path(self.name).expanduser()
        return str(self.tokenizer) if directory.is_dir() and directory.resolve() == self.tokenizer else self.name

    def checked(self, name: str) -> str:
        """The name itself, once it is one of the model's.

        Raises:
            UsageError: It is not; the message says how to make it one.
        """
        if name not in self.names:
            raise UsageError(
                f"this server has no model {name!r}; it serves {self.name} under the names {', '.join(self.names)}. "
                f"Start it with --alias {name}={self.name} to give it this one too"
            )
        return name


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much clients may ask for."""

    body_mb: int = 256
    """Largest body of a request, in millions of bytes."""
    request_tokens: int = 4_000_000
    """Most tokens of one forward_backward."""
    samples: int = 1024
    """Most samples of one request."""
    waiting_samples: int = 8192
    """Samples that may wait; beyond, clients are told to come back later (429)."""
    sample_tokens: int = 10_000_000
    """Most tokens that one request to sample may ask for: of its samples, and of tables of likeliest tokens."""
    waiting_mb: int = 1000
    """Data to learn from that may wait, in millions of bytes, and as much of prompts to sample from with what they
    ask for; beyond, clients are told to come back later (429)."""
    answers_mb: int = 500
    """What answers that are kept for clients may take, in millions of bytes; beyond, the oldest go."""
    models: int = 32
    """Models being trained at once, over all sessions."""
    samplers: int = 64
    """Samplers kept in memory; the one unused longest goes first."""
    session_timeout_s: float = 1800.0
    """A session that is silent for so long is over: its models are gone, its checkpoints stay."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
