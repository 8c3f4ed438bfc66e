"""Where the time of one decode call and of one SFT step goes: `python benchmarks/profile_steps.py --data hh.jsonl.gz`.

Profiles what the rows `decode` and `sft` measure (torch.profiler, CPU) and writes shares of time by kind, as json
(`--output`) and as text beside it. (Not called `profile`: scripts here would import it in place of Python's own.)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import decode
import sft
from measuring import Once, Work, gemm_peak, timed, versions
from record import commit, machine, today
from work import build

Shapes = Sequence[Sequence[int]]

WORK = {"decode": decode.tercet, "sft": sft.tercet}
PRODUCTS = ("frozen weights", "adapters", "head", "attention's products")
KINDS = (
    *PRODUCTS, "attention's softmax", "softmax over the vocabulary", "norms and gates", "moving and copying",
    "drawing", "optimizer", "the rest", "between operations",
)  # fmt: skip
# Operations and ranges whose insides are of one kind.
WITHIN = {
    "_RmsNorm": "norms and gates", "_Gate": "norms and gates", "aten::rms_norm": "norms and gates",
    "aten::silu": "norms and gates", "drawing": "drawing",
}  # fmt: skip
# Those whose insides are moves, or else of one kind.
WITHIN_BUT_MOVES = {
    "_ForestAttention": "attention's softmax", "aten::softmax": "attention's softmax",
    "_FrozenHead": "softmax over the vocabulary",
}  # fmt: skip
MOVES = frozenset({
    "_reorder_linear_weight", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "cat", "clone",
    "constant_pad_nd", "contiguous", "copy_", "detach", "embedding", "empty", "empty_like", "empty_strided", "expand",
    "fill_", "flatten", "gather", "index", "index_put_", "_index_put_impl_", "index_add_", "index_select",
    "masked_fill_", "narrow", "new_empty", "new_full", "new_zeros", "pad", "permute", "reshape", "resize_",
    "scatter_", "select", "slice", "split", "split_with_sizes", "stack", "to", "transpose", "unsqueeze", "view",
    "where", "zero_", "zeros", "zeros_like",
})  # fmt: skip


def operations(name: str, shapes: Shapes) -> float:
    """Of a product; 0 of anything else."""
    if name == "mkldnn::_linear_pointwise":
        # With another tensor to add or multiply, the weight comes third.
        weight = shapes[2] if len(shapes[2]) == 2 else shapes[1]
        return 2.0 * prod(shapes[0]) * weight[0]
    if name in ("aten::mm", "aten::bmm"):
        return 2.0 * prod(shapes[0]) * shapes[1][-1]
    if name in ("aten::addmm", "aten::addmm_", "aten::baddbmm"):
        return 2.0 * prod(shapes[1]) * shapes[2][-1]
    return 0.0


def kind(name: str, within: Sequence[str], shapes: Shapes, *, vocabulary: int, rank: int) -> str:
    """Of one operation.

    Args:
        name: Its own.
        within: Names of the operations that it is part of, innermost first.
        shapes: Of its inputs.
        vocabulary: A product with this in its shapes is the head's.
        rank: One with this, an adapter's.
    """
    if operations(name, shapes):
        sizes = {size for shape in shapes for size in shape}
        if name in ("aten::bmm", "aten::baddbmm"):
            return "attention's products"
        return "head" if vocabulary in sizes else "adapters" if rank in sizes else "frozen weights"
    around = [each.removeprefix("autograd::engine::evaluate_function: ") for each in (name, *within)]
    around = [each.removesuffix("Backward") for each in around]
    if any(each.startswith("Optimizer.") for each in around):
        return "optimizer"
    if found := [WITHIN[each] for each in around if each in WITHIN]:
        return found[0]
    if name.partition("::")[2] in MOVES:
        return "moving and copying"
    if found := [WITHIN_BUT_MOVES[each] for each in around if each in WITHIN_BUT_MOVES]:
        return found[0]
    return "the rest"


def profiled(once: Once, *, vocabulary: int, rank: int) -> dict[str, Any]:
    """One run without the profiler and one with it; seconds, share and, of products, GFLOP/s of each kind."""
    from torch.profiler import ProfilerActivity, profile

    once()
    plain = once().seconds
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        seconds, _ = timed(once)
    spent, done = dict.fromkeys(KINDS, 0.0), dict.fromkeys(PRODUCTS, 0.0)
    for event in profiler.events():
        inside, above = [], event.cpu_parent
        while above is not None:
            inside.append(above)
            above = above.cpu_parent
        # What a product allocates or looks at is its own time.
        of = next((each for each in reversed(inside) if operations(each.name, each.input_shapes)), event)
        names = [each.name for each in inside]
        which = kind(of.name, names, of.input_shapes, vocabulary=vocabulary, rank=rank)
        spent[which] += event.self_cpu_time_total / 1e6
        if of is event and which in done:
            done[which] += operations(event.name, event.input_shapes)
    spent["between operations"] = max(0.0, seconds - sum(spent.values()))
    return {
        "seconds": plain,
        "seconds_profiled": seconds,
        "kinds": {
            name: {
                "seconds": spent[name],
                "share": spent[name] / seconds,
                "gflops": done[name] / spent[name] / 1e9 if done.get(name) else None,
            }
            for name in KINDS
        },
    }


def in_range(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, under a name of its own in the profile."""
    from torch.profiler import record_function

    def named(*args: Any) -> Any:
        with record_function(name):
            return function(*args)

    return named


def table(found: dict[str, Any]) -> str:
    """As markdown."""
    lines = ["| of the time | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    for name in KINDS:
        cells = [each["kinds"][name] for each in found.values()]
        shown = [
            f"{cell['share']:.1%}" + (f", {cell['gflops']:.0f} GFLOP/s" if cell["gflops"] else "") for cell in cells
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    seconds = [f"{each['seconds']:.2f} s ({each['seconds_profiled']:.2f})" for each in found.values()]
    return "\n".join([*lines, "| in all, without profiler (with) | " + " | ".join(seconds) + " |"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name or directory of the model")
    parser.add_argument("--data", type=Path, help="json lines with `chosen` and `rejected` as in HH-RLHF")
    parser.add_argument("--threads", type=int, help="as many as torch would take by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "profile.json", help="where json goes")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and made-up data")
    args = parser.parse_args(argv)
    if not args.smoke and args.data is None:
        parser.error("--data is missing; give a file of comparisons, or --smoke")

    import torch
    from transformers import AutoConfig

    import tercet.engine.sampler as sampler
    from tercet.models.names import resolve

    torch.set_num_threads(args.threads or torch.get_num_threads())
    sampler.draw = in_range(sampler.draw, "drawing")
    model = str(resolve("tiny" if args.smoke else args.model))
    work: Work = build(model, args.data, smoke=args.smoke)
    sizes = {"vocabulary": AutoConfig.from_pretrained(model).vocab_size, "rank": work.settings["rank"]}
    found = {name: profiled(side(work), **sizes) for name, side in WORK.items()}
    peak, library = gemm_peak(work.device, work.dtype, smoke=work.smoke)
    stamp = {
        "gemm_gflops": peak, "gemm_library": library, "machine": machine(torch.get_num_threads()),
        "versions": versions(), **commit(), "measured": today(),
    }  # fmt: skip
    text = f"{table(found)}\n\nGEMM peak {peak:.0f} GFLOP/s ({library})\n"
    args.output.write_text(json.dumps({"profiled": found, **stamp}, indent=1) + "\n")
    args.output.with_suffix(".txt").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
