"""Memory that ran out: how it is told, and what is done before less is tried."""

from __future__ import annotations

import gc
import re

import torch

# Torch's allocators, the libraries of CUDA, and oneDNN, which says the second last where it has no memory for its code
# ("primitive descriptor" is of shapes that it does not take).
RAN_OUT = re.compile(
    "out of memory|out_of_memory|can't allocate memory|not enough memory|status_alloc_failed"
    "|could not create a primitive(?! desc)|could not create a memory(?! desc)"
)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # All but torch's allocator on a GPU raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and RAN_OUT.search(str(error).lower()) is not None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def give_back() -> None:
    """Free what only frames of an error still held; to be called outside of its except clause."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
