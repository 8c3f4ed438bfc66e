"""Every loss, in one table you can read. Adding one is a function and a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tercet.losses import direct
from tercet.losses.both_orders import both_orders_loss
from tercet.losses.bradley_terry import bradley_terry_loss
from tercet.losses.direct_free import cpo_loss, orpo_loss, simpo_loss
from tercet.losses.direct_mixture import mixture_loss
from tercet.losses.direct_regression import rebel_loss
from tercet.losses.direct_unpaired import apo_zero_unpaired_loss, kto_loss
from tercet.losses.likelihood import cross_entropy_loss
from tercet.losses.off_policy import dro_loss, gspo_loss
from tercet.losses.policy_gradient import cispo_loss, importance_sampling_loss, ppo_loss
from tercet.losses.ppo_critic import (
    abs_kl_term,
    clipped_value_loss,
    entropy_bonus,
    k3_term,
    kl_term,
    mse_kl_term,
    ppo_critic_loss,
)

Reduction = Literal["sum", "token_mean", "row_mean", "pair_mean"]
Per = Literal["token", "row", "pair"]


@dataclass(frozen=True)
class Loss:
    """How a pure function is fed and how its values become one number.

    `sum` adds weight x value over every token (Tinker's convention); `token_mean` divides that by the weight of the
    whole batch; `row_mean` divides by the number of sequences that have a weight; `pair_mean` by the weight of all
    pairs.
    """

    function: Callable[..., Any]
    """Gives one value per token, row or pair, and metrics of that shape."""
    reduction: Reduction
    streams: tuple[str, ...] = ()
    """What every datum must bring: per token, or, for rows and pairs, summed with its weights over the row."""
    per: Per = "token"
    """A function per pair is also given `chosen` and `rejected`, which index its rows."""
    inputs: tuple[str, ...] = ("logprobs",)
    """What it reads of the model, in order. Per token: logprobs, entropies (learned from), values (of the head). Per
    row or pair: logprobs (sum of weight x log-prob over the row), lengths (sum of its weights), scores (the head at
    its last token)."""
    pair_streams: tuple[str, ...] = ()
    """What the batch must bring of every pair."""
    separable: bool = True
    """Whether a row's or pair's value depends on itself alone. If not, the whole batch is looked at in two passes."""


_REFERENCE = ("reference_logprobs",)
_LENGTHS = ("logprobs", "lengths")
_TOKEN_MEAN = ("mean_chosen_length",)

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy_loss, "token_mean"),
    "importance_sampling": Loss(importance_sampling_loss, "token_mean", ("sampling_logprobs", "advantages")),
    "ppo": Loss(ppo_loss, "token_mean", ("sampling_logprobs", "advantages")),
    "cispo": Loss(cispo_loss, "token_mean", ("sampling_logprobs", "advantages")),
    "dro": Loss(dro_loss, "token_mean", ("sampling_logprobs", "advantages")),
    "gspo": Loss(gspo_loss, "token_mean", ("sampling_logprobs", "advantages", "sequence_ratio_mask")),
    # Sums over tokens, as the Tinker protocol has them: the pieces of a batch sent one by one add up to the whole.
    "cross_entropy_sum": Loss(cross_entropy_loss, "sum"),
    "importance_sampling_sum": Loss(importance_sampling_loss, "sum", ("sampling_logprobs", "advantages")),
    "ppo_sum": Loss(ppo_loss, "sum", ("sampling_logprobs", "advantages")),
    "cispo_sum": Loss(cispo_loss, "sum", ("sampling_logprobs", "advantages")),
    "dro_sum": Loss(dro_loss, "sum", ("sampling_logprobs", "advantages")),
    "gspo_sum": Loss(gspo_loss, "sum", ("sampling_logprobs", "advantages", "sequence_ratio_mask")),
    "bradley_terry": Loss(bradley_terry_loss, "pair_mean", per="pair", inputs=("scores",), pair_streams=("margins",)),
    "both_orders": Loss(both_orders_loss, "pair_mean", per="pair", pair_streams=("comparisons", "decided")),
    "value": Loss(clipped_value_loss, "token_mean", ("old_values", "returns"), inputs=("values",)),
    "ppo_critic": Loss(
        ppo_critic_loss,
        "token_mean",
        ("sampling_logprobs", "advantages", "old_values", "returns"),
        inputs=("logprobs", "values"),
    ),
    "entropy_bonus": Loss(entropy_bonus, "token_mean", inputs=("entropies",)),
    "kl_term": Loss(kl_term, "token_mean", _REFERENCE),
    "abs_kl_term": Loss(abs_kl_term, "token_mean", _REFERENCE),
    "mse_kl_term": Loss(mse_kl_term, "token_mean", _REFERENCE),
    "k3_term": Loss(k3_term, "token_mean", _REFERENCE),
    "sigmoid": Loss(direct.sigmoid_loss, "pair_mean", _REFERENCE, per="pair"),
    "robust": Loss(direct.robust_loss, "pair_mean", _REFERENCE, per="pair"),
    "hinge": Loss(direct.hinge_loss, "pair_mean", _REFERENCE, per="pair"),
    "ipo": Loss(direct.ipo_loss, "pair_mean", _REFERENCE, per="pair"),
    "exo": Loss(direct.exo_loss, "pair_mean", _REFERENCE, per="pair"),
    "nca": Loss(direct.nca_loss, "pair_mean", _REFERENCE, per="pair"),
    "bco": Loss(direct.bco_loss, "pair_mean", _REFERENCE, per="pair"),
    "sppo_hard": Loss(direct.sppo_hard_loss, "pair_mean", _REFERENCE, per="pair"),
    "apo_zero": Loss(direct.apo_zero_loss, "pair_mean", _REFERENCE, per="pair"),
    "apo_down": Loss(direct.apo_down_loss, "pair_mean", _REFERENCE, per="pair"),
    "discopop": Loss(direct.discopop_loss, "pair_mean", _REFERENCE, per="pair"),
    "ipo_mean": Loss(direct.ipo_mean_loss, "pair_mean", _REFERENCE, per="pair", inputs=_LENGTHS),
    "sigmoid_norm": Loss(direct.sigmoid_norm_loss, "pair_mean", _REFERENCE, per="pair", inputs=_LENGTHS),
    "aot": Loss(direct.aot_loss, "pair_mean", _REFERENCE, per="pair", separable=False),
    "aot_unpaired": Loss(direct.aot_unpaired_loss, "pair_mean", _REFERENCE, per="pair", separable=False),
    "simpo": Loss(simpo_loss, "pair_mean", per="pair", inputs=_LENGTHS),
    "cpo": Loss(cpo_loss, "pair_mean", per="pair", pair_streams=_TOKEN_MEAN),
    "orpo": Loss(orpo_loss, "pair_mean", per="pair", inputs=_LENGTHS, pair_streams=_TOKEN_MEAN),
    "mixture": Loss(mixture_loss, "pair_mean", _REFERENCE, per="pair", inputs=_LENGTHS, pair_streams=_TOKEN_MEAN),
    "rebel": Loss(rebel_loss, "pair_mean", _REFERENCE, per="pair", pair_streams=("reward_gaps",)),
    "kto": Loss(kto_loss, "row_mean", (*_REFERENCE, "desirable", "kl"), per="row"),
    "apo_zero_unpaired": Loss(apo_zero_unpaired_loss, "row_mean", (*_REFERENCE, "desirable"), per="row"),
}
