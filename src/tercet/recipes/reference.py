"""What the policy at the start says of the rows: computed once, kept in the run's folder, read back when it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tercet.data import index_at
from tercet.engine.base import Trainer
from tercet.errors import CheckpointError
from tercet.recipes.rows import rows_sha256
from tercet.recipes.session import Say
from tercet.runs.durable import beside, sync
from tercet.runs.progress import ProgressDisplay
from tercet.types import Batch, Datum

FILE = "reference.safetensors"
ROWS_AT_ONCE = 64


def rows_reached(rows: int, steps: int, rows_per_step: int, epochs: int, *, seed: int) -> list[int]:
    """Which rows so many steps come to; of the others nothing needs to be known."""
    last = min(steps * rows_per_step, rows * epochs)
    return sorted({index_at(position, rows, seed=seed) for position in range(last)})


def reference_logprobs(
    directory: Path, trainer: Trainer, data: Sequence[Datum], *, say: Say, temperature: float = 1.0, file: str = FILE
) -> list[list[float]]:
    """Log-probs of every learned token of the rows under a trainer that has not learned yet.

    They come from the trainer itself and not from a sampler, so that the policy's own begin exactly there.

    Args:
        directory: The run's folder.
        trainer: With the weights at the start.
        data: The rows.
        say: Told what is done.
        temperature: Of the distribution.
        file: Name of the file in the folder.

    Returns:
        Position for position, 0.0 where the weight is 0.

    Raises:
        CheckpointError: The file that is there belongs to other rows or weights, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    path = directory / file
    key = {"rows": rows_sha256(data), "weights": trainer.fingerprint(), "temperature": repr(temperature)}
    lengths = [len(datum.tokens) for datum in data]
    if path.exists():
        try:
            with safe_open(path, framework="numpy") as kept:
                found, flat = kept.metadata(), kept.get_tensor("logprobs")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; delete it, and it is computed again") from error
        if found != key or len(flat) != sum(lengths):
            different = ", ".join(name for name in key if (found or {}).get(name) != key[name]) or "length"
            raise CheckpointError(
                f"{path} was computed for another run (its {different} differ); delete it, or choose another --out"
            )
        say(f"reference log-probs of {len(data):,} rows: read from {path}")
        return [row.tolist() for row in np.split(flat, np.cumsum(lengths)[:-1])]
    say(f"reference log-probs of {len(data):,} rows: computed once, kept in {path}")
    rows: list[list[float]] = []
    starts = range(0, len(data), ROWS_AT_ONCE)
    with ProgressDisplay("reference", total_steps=len(starts), shown={}) as progress:
        for part, at in enumerate(starts):
            batch = Batch(data[at : at + ROWS_AT_ONCE])
            rows += trainer.forward(batch, temperature=temperature).result().logprobs
            progress.update(part, {})
    flat = np.asarray([value for row in rows for value in row], dtype=np.float32)
    save_file({"logprobs": flat}, beside(path), metadata=key)
    sync(beside(path))
    beside(path).replace(path)
    sync(directory)
    return rows
