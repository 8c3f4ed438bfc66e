"""transformers without its bars and warnings, for as long as needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as untyped

logging: Any = untyped


@contextmanager
def quiet() -> Iterator[None]:
    """Loading bars and warnings off inside the block, as they were after it; errors are still raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
