"""One run, one folder: metrics, samples, checkpoints, going on after a stop, and the report."""

from tercet.runs.checkpoints import Saves, final_weights
from tercet.runs.environment import environment
from tercet.runs.interruption import Interrupted
from tercet.runs.loggers import Logger, make_loggers
from tercet.runs.progress import ProgressDisplay
from tercet.runs.rows import append_rows, read_rows
from tercet.runs.run import Run, Start

__all__ = [
    "Interrupted",
    "Logger",
    "ProgressDisplay",
    "Run",
    "Saves",
    "Start",
    "append_rows",
    "environment",
    "final_weights",
    "make_loggers",
    "read_rows",
]
