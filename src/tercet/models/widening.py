"""Products of numbers of half precision that come out in float32.

Rounded to 8 bits a logit or a score near 20 is off by 0.06, which is more than two answers often differ in.
"""

from __future__ import annotations

from collections.abc import Set

import torch

HALF = frozenset({torch.bfloat16, torch.float16})
# Of AMD's GPUs, which call themselves cuda too, torch has no such products.
WIDENS: Set[str] = frozenset({"cuda"} if torch.version.hip is None else ())


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch gives products of such numbers there in float32, with `out_dtype`."""
    return dtype in HALF and device.type in WIDENS
