"""Every loss, in one table you can read. Adding one is a function and a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tercet.losses.likelihood import cross_entropy_loss
from tercet.losses.policy_gradient import cispo_loss, importance_sampling_loss, ppo_loss

Reduction = Literal["sum", "token_mean", "row_mean"]


@dataclass(frozen=True)
class Loss:
    """How a pure function is fed and how its values become one number.

    `sum` adds weight x value over every token (Tinker's convention); `token_mean` divides that by the weight of the
    whole batch; `row_mean` divides by the number of sequences that have a weight.
    """

    function: Callable[..., Any]
    reduction: Reduction
    streams: tuple[str, ...] = ()


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy_loss, "token_mean"),
    "importance_sampling": Loss(importance_sampling_loss, "token_mean", ("sampling_logprobs", "advantages")),
    "ppo": Loss(ppo_loss, "token_mean", ("sampling_logprobs", "advantages")),
    "cispo": Loss(cispo_loss, "token_mean", ("sampling_logprobs", "advantages")),
}
