"""Every error tercet raises on purpose.

::

    TercetError             exit code 1: something failed
    ├── UsageError          exit code 2: the command or the config is wrong
    │   └── ConfigError     a setting is unknown, out of range, or differs from the run's
    ├── DataError           a row, a file or a conversation cannot be used; names file and row
    ├── ModelError          a model or tokenizer cannot be loaded or lacks what is needed
    ├── EngineError         an engine was asked for what it cannot do
    ├── CheckpointError     a checkpoint is damaged or belongs to another run
    ├── RewardError         a reward could not be had: a server failed, a function gave something else
    └── TrainingError       training went wrong: a loss that is not finite, a failed self-check
"""


class TercetError(Exception):
    """Root of the tree; the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class UsageError(TercetError):
    """The command as typed cannot be carried out."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, out of range, or differs from the run it should continue."""


class DataError(TercetError):
    """Data cannot be used; the message names file and row."""


class ModelError(TercetError):
    """A model or tokenizer cannot be loaded, or lacks something needed."""


class EngineError(TercetError):
    """An engine was asked for something it cannot do."""


class CheckpointError(TercetError):
    """A checkpoint is damaged, incomplete or of another run."""


class TrainingError(TercetError):
    """Training cannot go on: a loss that is not finite, or a self-check that failed."""


class RewardError(TercetError):
    """An answer's reward could not be had. It is never replaced by a number."""
