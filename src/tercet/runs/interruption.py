"""Ctrl-C: finish the step, save, say how to go on."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, and what it had learned is saved. The message says how to go on."""

    exit_code = 130


class Interruption:
    """Turns the first SIGINT or SIGTERM into a flag; the second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Start listening; does nothing outside of the main thread, where Python allows no signal handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def remove(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # The system's own handler, not one in Python, which would wait for a long tensor operation to return.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nsaving after this step, then stopping (again: stop at once, back to the last save)\n")


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
