"""What a person sees while a run goes on: stage, step, time left, and the numbers that matter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

SHOWN: dict[str, dict[str, str]] = {
    "sft": {"loss": "loss", "test/nll": "test nll"},
    "preference": {"loss": "loss", "accuracy": "accuracy", "test/accuracy_both": "test accuracy"},
    "judge": {"loss": "loss", "accuracy": "accuracy", "test/accuracy_both": "test accuracy"},
    "dpo": {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"},
    "kto": {"loss": "loss", "rewards/margins": "margin", "kl": "kl"},
    "rebel": {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"},
    "rl": {
        "reward": "reward",
        "test/win_rate": "win rate",
        "kl": "kl",
        "completions/mean_length": "tokens",
    },
}
"""The numbers that matter, and what they are called: those of each stage."""


class ProgressDisplay:
    """A live bar in a terminal; elsewhere a line now and then, and always for the first and the last step."""

    def __init__(
        self,
        stage: str,
        *,
        total_steps: int,
        first_step: int = 0,
        shown: Mapping[str, str] | None = None,
        console: Console | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage = stage
        self._total = total_steps
        self._first = first_step
        self._shown = SHOWN.get(stage, {"loss": "loss"}) if shown is None else shown
        self._console = console or Console(stderr=True)
        self._every_s = every_s
        self._clock = clock
        self._values: dict[str, float] = {}
        # The time left follows the last steps: the first ones of a run are slower than the rest.
        self._times: deque[float] = deque([clock()], maxlen=21)
        self._printed_at: float | None = None
        self._live: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("step {task.completed}/{task.total}"),
                TextColumn("[dim]{task.fields[left]}"),
                TextColumn("{task.fields[numbers]}"),
            )
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task(stage, total=total_steps, completed=first_step, left="", numbers="")
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done; a number not in `metrics` keeps its last value.

        A row after the last step holds what was measured at the end; it counts as no step.
        """
        done = min(step + 1, self._total)
        self._values |= {key: metrics[key] for key in self._shown if key in metrics}
        self._times.append(self._clock())
        left = format_duration(self.left_s(step)) + " left" if done < self._total else "done"
        numbers = [
            f"{label} {format_number(self._values[key])}" for key, label in self._shown.items() if key in self._values
        ]
        if self._live is not None:
            self._live.update(self._task, completed=done, left=left, numbers="  ".join(numbers))
        elif self._is_due(step):
            self._printed_at = self._clock()
            self._print(f"{self._stage}  step {done}/{self._total}  {left}", numbers)

    def left_s(self, step: int) -> float:
        """Seconds until the last step, as fast as the last twenty went."""
        pace = (self._times[-1] - self._times[0]) / max(1, len(self._times) - 1)
        return pace * (self._total - step - 1)

    def close(self) -> None:
        """End the display; what it showed last stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _is_due(self, step: int) -> bool:
        if self._printed_at is None or step + 1 >= self._total:
            return True
        return self._clock() - self._printed_at >= self._every_s

    def _print(self, head: str, numbers: Sequence[str]) -> None:
        self._console.print(Text("  ".join([head, *numbers])), soft_wrap=True)


def format_number(value: float) -> str:
    """Four figures, plainly: 0.7313, 12.35, 1204, 3.1e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2g}"


def format_duration(seconds: float) -> str:
    """A time in two units: 48 s, 3 min 20 s, 5 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
