"""The loss of reward models: one value per pair, from one score per sequence."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bradley_terry_loss(
    scores: Float[Tensor, " N"],
    *,
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    margins: Float[Tensor, " P"],
    center: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, " P"], dict[str, Float[Tensor, " P"]]]:
    """Minus the log-probability of the verdict under Bradley & Terry 1952: sigmoid(chosen - rejected - margin).

    Args:
        scores: Of every answer.
        chosen: Index of each pair's better answer.
        rejected: Index of its worse one.
        margins: By how much, at least, the better answer shall score higher (Touvron et al. 2023, arXiv:2307.09288).
        center: Weight of (chosen + rejected)^2, which keeps scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244).
        label_smoothing: Share of the verdicts that is taken to be the wrong way round.
    """
    better, worse = scores[chosen], scores[rejected]
    gap = better - worse - margins
    right, wrong = torch.nn.functional.logsigmoid(gap), torch.nn.functional.logsigmoid(-gap)
    values = -(1 - label_smoothing) * right - label_smoothing * wrong + center * (better + worse) ** 2
    with torch.no_grad():
        metrics = {
            "accuracy": (better > worse).to(scores.dtype),
            "score_gap": better - worse,
            "score": (better + worse) / 2,
        }
    return values, {name: each.detach() for name, each in metrics.items()}
