"""Where metrics go besides metrics.jsonl: TensorBoard always, Weights & Biases and Trackio when asked."""

from __future__ import annotations

import difflib
import importlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tercet.errors import ConfigError, UsageError
from tercet.runs.durable import write_atomically
from tercet.runs.settings import plain


class Logger(Protocol):
    """A place where metrics go. A run killed and started again does some steps twice; a logger shows each once."""

    def begin(self, directory: Path, config: Mapping[str, object], *, stage: str, step: int, logged_steps: int) -> None:
        """Get ready.

        Args:
            directory: The run's folder.
            config: The run's config.
            stage: The run's stage, as a name for what is logged.
            step: The first step that will be logged now.
            logged_steps: The steps below this one were logged before by a process that was stopped; as a resumed run
                repeats itself exactly, those from `step` on come again with the same numbers.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step."""
        ...

    def flush(self) -> None:
        """Write out what was taken; called before each checkpoint."""
        ...

    def close(self) -> None:
        """Write out and end; may be called without `begin`."""
        ...


class TensorBoard:
    """Event files in the run's folder `tensorboard/`."""

    def __init__(self) -> None:
        self._writer: Any = None

    def begin(self, directory: Path, config: Mapping[str, object], *, stage: str, step: int, logged_steps: int) -> None:
        """Open a new event file, which hides the steps of earlier files that will be done again."""
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(directory / "tensorboard"), purge_step=step if logged_steps else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to the curve of each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write events out."""
        self._writer.flush()

    def close(self) -> None:
        """Write events out and end."""
        if self._writer is not None:
            self._writer.close()


class Tracker:
    """Weights & Biases or Trackio, which share one way of being called.

    A run keeps its id in the file `<module>.id` of its folder. Points cannot be taken back from these services, so
    steps that were sent before are not sent again.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._api: Any = None
        self._sent_steps = 0

    def begin(self, directory: Path, config: Mapping[str, object], *, stage: str, step: int, logged_steps: int) -> None:
        """Begin a run there, or continue the one begun before.

        Raises:
            UsageError: The library is not installed.
        """
        try:
            self._api = importlib.import_module(self._module)
        except ImportError as error:
            raise UsageError(
                f"{self._module} was asked for and is not installed ({error}); "
                f"install it with: pip install 'tercet[{self._module}]'"
            ) from error
        self._sent_steps = logged_steps
        path = directory / f"{self._module}.id"
        if not path.exists():
            write_atomically(path, secrets.token_hex(4))
        run_id = path.read_text()
        settings: dict[str, Any] = {"config": plain(config), "resume": "allow"}
        if self._module == "wandb":
            name = f"{directory.resolve().parent.name}/{directory.name}"
            settings |= {"id": run_id, "name": name, "group": stage, "dir": str(directory)}
        else:
            # Trackio finds a run again by its name.
            settings |= {"name": f"{stage}-{run_id}"}
        project = os.environ.get(f"{self._module.upper()}_PROJECT", "tercet")
        self._api.init(project=project, **settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step, unless they were sent before."""
        if step >= self._sent_steps:
            self._api.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Nothing to do: these send from a thread of their own."""

    def close(self) -> None:
        """Send what is left and end."""
        if self._api is not None:
            self._api.finish()
            self._api = None


LOGGERS: dict[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda: Tracker("wandb"),
    "trackio": lambda: Tracker("trackio"),
}


def make_loggers(also: Sequence[str] = ()) -> list[Logger]:
    """TensorBoard, and the loggers named.

    Raises:
        ConfigError: A name is not known.
    """
    for name in also:
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, n=1, cutoff=0)[0]
            raise ConfigError(f"there is no logger {name!r}; did you mean {near!r}? ({', '.join(LOGGERS)})")
    return [LOGGERS[name]() for name in dict.fromkeys(["tensorboard", *also])]
