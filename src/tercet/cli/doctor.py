"""`tercet doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from tercet.config import parse
from tercet.runs.environment import default_threads, environment

CORE = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "PyYAML",
    "rich",
    "matplotlib",
    "tensorboard",
)
EXTRAS = {
    "wandb": "log to Weights & Biases",
    "trackio": "log to trackio",
    "vllm": "sample with vLLM on a GPU",
    "ray": "place work on a cluster",
    "fastapi": "serve models",
}
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
"""The model of the default run, as its config.json says; the doctor should not have to fetch it to answer."""
DISK_GIB = 3.0
"""What the model of the default run and the run itself take."""
LESS_TOKENS = 512
"""In a pass, and in a comparison: what is advised where memory is short."""
PYTHON_BYTES = 0.8e9
"""Main memory of Python with torch and transformers imported and nothing loaded."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Show what works on this machine, and why the rest does not; the exit code is 0 when the core works."""

    out: Path = Path("runs")
    """Where runs would be written; its disk is looked at."""
    hub_timeout_s: float = 3.0
    """How long to wait for the hub, in seconds; 0 does not ask it."""


@dataclass(frozen=True)
class Finding:
    """One line of the table. `broken` is of the core; a `note` is good to know."""

    what: str
    found: str
    state: Literal["fine", "note", "broken"] = "fine"
    advice: str = ""


def main(argv: list[str]) -> int:
    """Carry out the verb."""
    config = parse(DoctorConfig, argv, prog="tercet doctor")
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    with console.status("looking around"):
        findings = list(examine(config))
    table = Table()
    for title in ("", "what", "found", "advice"):
        table.add_column(title, overflow="fold")
    signs = {"fine": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    for finding in findings:
        table.add_row(signs[finding.state], *map(escape, (finding.what, finding.found, finding.advice)))
    console.print(table)
    broken = [finding.what for finding in findings if finding.state == "broken"]
    console.print(f"Not working: {', '.join(broken)}." if broken else "The core works: tercet rlhf can run here.")
    return 1 if broken else 0


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Everything worth knowing, the core first."""
    torch: Any = None
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a torch that cannot load its libraries raises whatever it likes
        yield Finding("import torch", f"fails: {error}", "broken", "install torch again, in a new environment")
    facts = environment()
    yield Finding("python", f"{facts['python']} on {facts['system']}")
    yield from libraries(facts["libraries"], tested_versions())
    yield from machine(facts)
    if torch is not None:
        from tercet.models.cpu import fast_dtype

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = fast_dtype(device)
        gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None
        yield memory(facts["memory_gib"], gpu_gib, dtype=dtype)
    yield disk(config.out)
    yield from cache()
    yield hub(config.hub_timeout_s)
    if torch is not None:
        yield speed(torch, device, dtype)
    for library, use in EXTRAS.items():
        try:
            yield Finding(f"extra: {library}", version(library))
        except PackageNotFoundError:
            yield Finding(f"extra: {library}", f"not installed; only needed to {use}")


def tested_versions() -> dict[str, str]:
    """Library to the version that tercet's tests pass with; empty when the list did not come along."""
    package = Path(__file__).parents[1]
    # In an installed package the list lies beside the code; in a clone it is the repository's own.
    for place in (package / "constraints.txt", package.parents[1] / "constraints.txt"):
        if place.is_file():
            pairs = (line.split("==") for line in place.read_text().splitlines() if "==" in line)
            return {name.lower(): wanted for name, wanted in pairs}
    return {}


def libraries(installed: Mapping[str, str], tested: Mapping[str, str]) -> Iterator[Finding]:
    """The libraries of the core against the tested versions."""
    for name in CORE:
        found, wanted = installed.get(name), tested.get(name.lower())
        if found is None:
            yield Finding(name, "not installed", "broken", f"pip install {name}{f'=={wanted}' if wanted else ''}")
        # What follows + names the build, as in 2.13.0+cpu; the code is the same.
        elif wanted is not None and found.partition("+")[0] != wanted:
            yield Finding(name, found, "note", f"tested with {wanted}; if something fails, try that")
        else:
            yield Finding(name, f"{found} (tested)" if wanted else found)


def machine(facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Cores, threads, GPU."""
    cores, threads = facts["cores"], default_threads(facts)
    yield Finding("cores", f"{cores} of {facts['cpus']:g} usable CPUs: {facts['cpu']}")
    if threads > cores:
        yield Finding("threads", f"{threads}", "note", f"more than cores: unset OMP_NUM_THREADS, or set it to {cores}")
    else:
        yield Finding("threads", f"{threads} of a sensible {cores}")
    gpus = facts["gpus"]
    yield Finding("GPU", "; ".join(gpus) if gpus else "none; the CPU does the work")


def memory(memory_gib: float, gpu_gib: float | None = None, *, dtype: str = "float32") -> Finding:
    """Memory of what computes, the GPU where there is one, against what the default run will take of it."""
    from tercet.recipes.rlhf import RLHFConfig

    what, there_gib = ("memory", memory_gib) if gpu_gib is None else ("GPU memory", gpu_gib)
    longest = RLHFConfig().preference.max_length
    needed_gib = default_run_gib(None, longest, gpu_gib=gpu_gib, dtype=dtype)
    found = f"{round(there_gib, 1):g} GiB; the default run takes about {needed_gib:.1f}"
    if there_gib >= needed_gib:
        return Finding(what, found)
    less_gib = default_run_gib(LESS_TOKENS, LESS_TOKENS, gpu_gib=gpu_gib, dtype=dtype)
    words = f"tercet rlhf --micro-batch-tokens {LESS_TOKENS} --preference.max-length {LESS_TOKENS}"
    return Finding(what, found, "note", f"{words} takes about {less_gib:.1f}")


def default_run_gib(micro_batch_tokens: int | None, max_length: int, *, gpu_gib: float | None, dtype: str) -> float:
    """What the default run takes with this much in a pass (None: what suits the machine), and comparisons of this
    length in both orders. Of a GPU's memory Python takes nothing."""
    from tercet.models.memory import estimate, pass_tokens, shape
    from tercet.recipes.rlhf import RLHFConfig

    run, model = RLHFConfig(), shape(SMOLLM2)
    gpu_bytes = None if gpu_gib is None else int(gpu_gib * 2**30)
    needed = estimate(
        model,
        lora_rank=run.lora.rank,
        micro_batch_tokens=micro_batch_tokens or pass_tokens(model, gpu_bytes, lora_rank=run.lora.rank, dtype=dtype),
        sampled_rows=min(run.max_rows, run.rl.completions_per_step),
        row_tokens=run.rl.max_prompt_length + run.rl.max_tokens,
        longest_tokens=max_length,
        tied=2,
        dtype=dtype,
        on_cpu=gpu_gib is None,
    )
    return (needed.total + (PYTHON_BYTES if gpu_gib is None else 0)) / 2**30


def disk(out: Path) -> Finding:
    """Room for runs."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free_gib = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        return Finding("disk", f"{place} cannot be written", "broken", "choose another directory with --out")
    enough = free_gib >= DISK_GIB
    advice = "" if enough else f"the default run and its model take {DISK_GIB:g} GiB"
    return Finding("disk", f"{free_gib:.0f} GiB free in {place}", "fine" if enough else "note", advice)


def cache() -> Iterator[Finding]:
    """Whether the model of the default run is there already."""
    from tercet.models.directories import cache_directory

    place = cache_directory()
    yield Finding("cache", str(place))
    if (place / "models" / "smollm2-135m").is_dir():
        yield Finding("smollm2-135m", "in the cache; no network is needed")
    else:
        advice = "tercet models fetch smollm2-135m, or let tercet rlhf do it"
        yield Finding("smollm2-135m", "not in the cache", "note", advice)


def hub(timeout_s: float) -> Finding:
    """Whether the hub answers. Asked in a thread, because looking up a name heeds no timeout."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "switched off by HF_HUB_OFFLINE", "note", "unset it to fetch models and data")
    if timeout_s <= 0:
        return Finding("hub", "not asked")
    answers: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s):
                answers.append("")
        except urllib.error.HTTPError:
            answers.append("")  # it refused the request, so it is there
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    started = time.monotonic()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if answers == [""]:
        return Finding("hub", f"{constants.ENDPOINT} answered in {time.monotonic() - started:.1f} s")
    why = answers[0] if answers else f"no answer in {timeout_s:g} s"
    advice = "not needed for the default run; for other models use local directories, or set HF_ENDPOINT to a mirror"
    return Finding("hub", f"cannot be reached: {why}", "note", advice)


def speed(torch: Any, device: str, dtype_name: str) -> Finding:
    """Matrix products per second, and the tokens per second of the built-in model that they allow."""
    from tercet.models.memory import shape

    dtype, size = getattr(torch, dtype_name), 4096 if device == "cuda" else 768
    left, right = (torch.rand(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(left, right).sum().item()
    repeats, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        (left @ right)[0, 0].item()  # reading one number waits for the GPU
        repeats += 1
    flops = 2 * size**3 * repeats / (time.perf_counter() - started)
    parameters = shape(SMOLLM2).parameters
    # Two operations a parameter and token forward, two more backward: an adapter needs no gradient of the weights.
    forward = flops / (2 * parameters)
    return Finding(
        "speed",
        f"{flops / 1e9:,.0f} GFLOP/s ({device}, {dtype_name}); smollm2-135m at best reads "
        f"{forward:,.0f} and learns from {forward / 2:,.0f} tokens/s",
    )
