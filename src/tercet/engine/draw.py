"""Drawing tokens from logits: which token, and its log-prob under the distribution it was drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tercet.types import SamplingParams

# The vocabulary is summed in blocks of this many tokens; one uniform number finds the block and then the token in it.
BLOCK = 512
# Rows drawn together on a CPU: what is computed of them stays in its cache.
CPU_ROWS = 16


def uniforms(seed: int, prompt: int, sample: int, n: int) -> np.ndarray:
    """The n numbers in [0, 1) that drive one completion: a function of (seed, prompt, sample) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, prompt, sample]))).random(n)


def origins(params: SamplingParams, seeds: Sequence[int] | None, prompts: int) -> list[tuple[int, int]]:
    """The first two of what drives a completion, (seed, prompt), for each of so many prompts.

    With `seeds`, one a prompt, each is drawn as if it were alone; without, prompt i is number i under `params.seed`.
    """
    return [(params.seed, i) if seeds is None else (seeds[i], 0) for i in range(prompts)]


def draw(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their log-probs (R,) from logits (R, V), with one uniform number (R,) each.

    Temperature 0 takes the likeliest token, and gives its log-prob at temperature 1. With top-p, top-k or min-p the
    log-prob is under what remains after them; each of the three looks at the whole distribution, and a token stays when
    all let it.
    """
    if logits.device.type != "cpu" or len(logits) <= CPU_ROWS:
        return _draw(logits, params, uniform)
    parts = [
        _draw(few, params, numbers)
        for few, numbers in zip(torch.split(logits, CPU_ROWS), torch.split(uniform, CPU_ROWS), strict=True)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _draw(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(logits, -1)
    logits = logits / params.temperature if params.temperature != 1 else logits
    if params.top_p < 1 or params.top_k > 0 or params.min_p > 0:
        logits = _restricted(logits, params)
    highest = logits.amax(-1, keepdim=True)
    mass = (logits - highest).exp_()
    tokens, total = _inverse_cdf(mass, uniform)
    chosen = logits.gather(-1, tokens[:, None])[:, 0] - highest[:, 0]
    return tokens, chosen - total.log().to(chosen.dtype)


def _restricted(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits with minus infinity where top-k, top-p or min-p forbid a token. The likeliest token always stays."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = torch.softmax(ordered, -1)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k > 0:
        keep[:, params.top_k :] = False
    if params.top_p < 1:
        keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    if params.min_p > 0:
        keep &= probabilities >= params.min_p * probabilities[:, :1]
    keep[:, 0] = True
    return torch.full_like(logits, float("-inf")).scatter(-1, order, ordered.masked_fill(~keep, float("-inf")))


def _inverse_cdf(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R,) where the running sum of mass (R, V) passes uniform x total, and the totals (R,)."""
    rows, vocabulary = mass.shape
    if vocabulary % BLOCK:
        mass = torch.nn.functional.pad(mass, (0, BLOCK - vocabulary % BLOCK))
    blocks = mass.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double().cumsum(-1)
    total = sums[:, -1]
    target = uniform.double() * total
    block = (sums <= target[:, None]).sum(-1).clamp(max=sums.shape[1] - 1)
    row = torch.arange(rows, device=mass.device)
    before = torch.where(block > 0, sums[row, (block - 1).clamp(min=0)], torch.zeros_like(total))
    inside = blocks[row, block]
    place = (inside.double().cumsum(-1) <= (target - before)[:, None]).sum(-1)
    # Rounding may carry the target past the block's end: stay on a token that has mass.
    last = BLOCK - 1 - (inside > 0).flip(-1).to(torch.uint8).argmax(-1)
    return block * BLOCK + torch.minimum(place, last), total
