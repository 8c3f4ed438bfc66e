"""How much is computed at once, and what happens when that is more than memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from tercet.engine.sampler import MAX_ROWS
from tercet.errors import EngineError
from tercet.models.out_of_memory import first_line, give_back, ran_out

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Budgets:
    """How much is computed at once; one for an engine and all that belongs to it."""

    micro_batch_tokens: int = 2048
    """Tokens of one pass with gradient, as they are computed: after merging prefixes, or with padding."""
    score_tokens: int = 4096
    """The same without gradient."""
    max_rows: int = MAX_ROWS
    """Completions decoded side by side."""
    cache_tokens: int | None = None
    """Fewer, where the keys and values of more tokens than this might be kept."""

    def within(
        self,
        budget: Literal["micro_batch_tokens", "score_tokens", "max_rows"],
        work: Callable[[int], Result],
        pieces: Callable[[int], object],
        undo: Callable[[], None] = lambda: None,
    ) -> Result:
        """Do work that is split by a token budget. When memory runs out, the budget is halved for good and it is done
        again.

        Args:
            budget: Which of them.
            work: Gets the budget, which counts tokens or rows.
            pieces: How the work is split under a budget; budgets that change nothing are passed over.
            undo: Takes back what half-done work has left, whatever ended it.

        Raises:
            EngineError: Memory runs out with the smallest pieces there are.
        """
        while True:
            now: int = getattr(self, budget)
            try:
                return work(now)
            except BaseException as error:
                if not ran_out(error):
                    undo()
                    raise
                said = first_line(error)
            # Outside of the except clause: the error's frames held what was computed.
            give_back()
            undo()
            whole, half = pieces(now), now // 2
            while half and pieces(half) == whole:
                half //= 2
            if not half:
                raise EngineError(
                    f"memory ran out with one sequence, or one pair, at a time: {said}; take shorter sequences, a "
                    "smaller model, or dtype bfloat16"
                )
            setattr(self, budget, half)
            logger.warning("memory ran out: %s is %d from here on instead of %d (%s)", budget, half, now, said)
