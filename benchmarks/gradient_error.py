"""How far float32 gradients are off the one in float64: `python benchmarks/gradient_error.py --data hh.jsonl.gz`.

The first group of the row `gradient`: tercet's gradient in float32 and that of transformers and peft in float32, each
against transformers and peft in float64, as the length of the difference over the length of the gradient.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradient_step import padded_step, place_of, trie_step
from local import engine
from measuring import Work, versions
from record import commit, machine, today
from trl_steps import peft_model
from work import build

if TYPE_CHECKING:
    import torch


def precise(model: Any) -> Any:
    """The model in float64, its norms too, which transformers computes in float32 whatever comes in.

    Angles of the rotation stay float32: they are the model's, and the same on every side.
    """
    import torch
    from torch.nn import functional

    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight, eps = module.weight, module.variance_epsilon
            assert weight.dtype == torch.float64
            module.forward = lambda x, weight=weight, eps=eps: functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return model


def gradient(step: Any, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """What a step leaves, in float64, by names that all sides share."""
    step()
    return {place_of(name): p.grad.double() for name, p in parameters.items() if p.grad is not None}


def error(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """Length of the difference over the length of the exact one."""
    assert found.keys() == exact.keys(), "the sides name their adapters differently"
    far = sum(float((found[name] - each).pow(2).sum()) for name, each in exact.items())
    return (far / sum(float(each.pow(2).sum()) for each in exact.values())) ** 0.5


def errors(work: Work) -> dict[str, float]:
    """Of the first group of the work."""
    one = replace(work, groups=work.groups[:1])
    exact = gradient(*padded_step(one, precise(peft_model(one))))
    return {
        "tercet": error(gradient(*trie_step(one, engine(one))), exact),
        "transformers": error(gradient(*padded_step(one, peft_model(one))), exact),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name or directory of the model")
    parser.add_argument("--data", type=Path, help="json lines with `chosen` and `rejected` as in HH-RLHF")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "gradient_error.json", help="the json")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and made-up data")
    args = parser.parse_args(argv)
    if not args.smoke and args.data is None:
        parser.error("--data is missing; give a file of comparisons, or --smoke")

    import torch

    from tercet.models.names import resolve

    work = build(str(resolve("tiny" if args.smoke else args.model)), args.data, smoke=args.smoke)
    found = errors(work)
    stamp = {"machine": machine(torch.get_num_threads()), "versions": versions(), **commit(), "measured": today()}
    args.output.write_text(json.dumps({"relative_error": found, **stamp}, indent=1) + "\n")
    print("".join(f"{side}: {far:.2g} of the gradient's length off float64\n" for side, far in found.items()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
