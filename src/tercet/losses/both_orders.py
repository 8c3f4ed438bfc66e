"""The loss of pairwise preference models that see every comparison in both orders."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def both_orders_loss(
    logprobs: Float[Tensor, " N"],
    *,
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    comparisons: Float[Tensor, " P"],
    decided: Float[Tensor, " P"],
    label_weight: float = 0.5,
) -> tuple[Float[Tensor, " P"], dict[str, Float[Tensor, " P"]]]:
    """Minus the log-sigmoid of the right label's mean log-odds over the orders of a comparison, and its likelihood.

    A pair is one order: the same prompt with the right label and with the other one. What a model prefers about a place
    whatever stands there has opposite signs in the log-odds of the two orders, so their mean knows nothing of it and
    gives it no gradient. In the likelihood of single labels that preference swings to and fro, and its gradient, alike
    for all rows, drowns the little that tells the answers apart.

    Args:
        logprobs: Of the label of each row.
        chosen: Index of the row with the right label.
        rejected: Index of the row with the other one.
        comparisons: A number for each pair, the same for all orders of one comparison.
        decided: 0 where the right label is a tie: there only its likelihood counts.
        label_weight: Share of the label's likelihood, which makes labels likely at all and keeps places alike; 1 is
            the published recipe.
    """
    odds = logprobs[chosen] - logprobs[rejected]
    _, group = torch.unique(comparisons, return_inverse=True)
    total = torch.zeros_like(odds).index_add(0, group, odds)
    count = torch.zeros_like(odds).index_add(0, group, torch.ones_like(odds))
    mean = total[group] / count[group]
    likelihood_weight = torch.where(decided > 0, label_weight, 1.0).to(odds.dtype)
    values = -likelihood_weight * logprobs[chosen] - (1 - likelihood_weight) * torch.nn.functional.logsigmoid(mean)
    with torch.no_grad():
        metrics = {
            "label_nll": -logprobs[chosen],
            "accuracy": (odds > 0).to(odds.dtype),
            "accuracy_both": (mean > 0).to(odds.dtype),
        }
    return values, {name: each.detach() for name, each in metrics.items()}
