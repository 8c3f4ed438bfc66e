"""Python functions as rewards, with TRL's signature: f(prompts, completions, **columns) -> numbers."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tercet.errors import RewardError, UsageError
from tercet.rewards.interface import Candidate
from tercet.types import Conversation, as_messages

Shows = Literal["messages", "text"]


class FunctionReward:
    """Calls a function, sync or async, with all answers of a batch at once.

    It is given `prompts` and `completions`, as lists of messages (role, content) or as text, and one list for every
    column of the data; those it does not name it need not take. Where it gives None it has nothing to say.
    """

    def __init__(self, function: Callable[..., Any], *, shows: Shows = "messages") -> None:
        self.function, self.shows = function, shows
        self.name = getattr(function, "__name__", type(function).__name__)

    def rewards(self, candidates: Sequence[Candidate]) -> list[float | None]:
        """See `AnswerReward`."""
        if not candidates:
            return []
        prompts = [self._shown(each.prompt) for each in candidates]
        completions = [self._shown(each.answer) for each in candidates]
        names = sorted({name for each in candidates for name in each.columns})
        columns = {name: [each.columns.get(name) for each in candidates] for name in names if self._takes(name)}
        found = self.function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        return checked_rewards(found, len(candidates), f"the reward function {self.name}")

    def _shown(self, turns: Conversation) -> object:
        if self.shows == "text":
            return "\n\n".join(message.content for message in turns)
        return as_messages(turns)

    def _takes(self, name: str) -> bool:
        parameters = inspect.signature(self.function).parameters
        return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


async def _awaited(found: Any) -> Any:
    return await found


def checked_rewards(found: Any, n: int, who: str) -> list[float | None]:
    """What somebody gave as rewards, as numbers.

    Raises:
        RewardError: They are not as many as the answers, or one is no number.
    """
    if hasattr(found, "tolist"):
        found = found.tolist()
    is_list = isinstance(found, Sequence) and not isinstance(found, str)
    if not is_list or len(found) != n:
        had = f"{len(found)} rewards" if is_list else repr(found)[:60]
        raise RewardError(f"{who} gave {had} for {n} answers; a number (or None) for each, in their order, was wanted")
    for i, value in enumerate(found):
        if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
            raise RewardError(f"{who} gave {value!r:.60} for answer {i}; it must be a finite number, or None")
    return [None if value is None else float(value) for value in found]


def load_function(place: str) -> Callable[..., Any]:
    """The function at `file.py:name` or `package.module:name`.

    Raises:
        UsageError: There is none.
    """
    module_name, _, name = place.rpartition(":")
    if not module_name:
        raise UsageError(f"the reward function is {place!r}; give it as file.py:name or package.module:name")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UsageError(f"there is no file {path} to take the reward function {name} from")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"the reward function {place} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {name!r} to take rewards from")
    found: Callable[..., Any] = function
    return found
