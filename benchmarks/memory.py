"""Peak memory of a step of reinforcement learning with a policy, a reference and a judge, against TRL's."""

from __future__ import annotations

from functools import partial
from typing import Any

from local import datum, engine, lora
from measuring import Once, Row, Run, Trial, Work, timed


def tercet(work: Work) -> Once:
    from tercet.types import AdamParams, Batch, Head, SamplingParams

    base, size = engine(work), work.settings
    tokenizer = base.loaded.tokenizer
    prompts = [tokenizer.encode(pair["prompt"], add_special_tokens=False) for pair in work.pairs[: size["rl_prompts"]]]
    # As many tokens at a time as the rows that TRL is given at a time.
    pass_tokens = size["memory_rows"] * (max(map(len, prompts)) + size["completion_tokens"])
    base.budgets.micro_batch_tokens = base.budgets.score_tokens = pass_tokens
    trainer, reference = base.trainer(lora=lora(work)), base.sampler()
    judge = base.trainer(lora=lora(work), head=Head()).scorer()
    adam = AdamParams(learning_rate=size["learning_rate"], max_grad_norm=1.0)

    losses: list[float] = []

    def step() -> int:
        params = SamplingParams(max_tokens=size["completion_tokens"], eos=False)
        groups = trainer.sampler().sample(prompts, params, size["group_size"]).result()
        rows = [(p, list(c.tokens), c.logprobs) for p, g in zip(prompts, groups, strict=True) for c in g]
        scores = judge.scores([[*p, *a] for p, a, _ in rows]).result()
        distances = reference.logprobs([[*p, *a] for p, a, _ in rows], [len(p) for p, _, _ in rows]).result()
        data = []
        for (prompt, answer, logprobs), score, far in zip(rows, scores, distances, strict=True):
            advantages = [score - 0.04 * (ours - theirs) for ours, theirs in zip(logprobs, far, strict=True)]
            data.append(datum(prompt, answer, sampling_logprobs=logprobs, advantages=advantages))
        learned = trainer.forward_backward(Batch(data), "ppo")
        trainer.optim_step(adam).result()
        losses.append(learned.result().loss)
        return sum(len(d.tokens) for d in data)

    def once() -> Run:
        return Run(*timed(step), 0.0, {"loss": losses[-1]})

    return once


def trl_settings(work: Work, *, checkpointing: bool) -> dict[str, Any]:
    """A few rows at a time; computing activations again on the way back takes the least memory, and longer."""
    from trl_steps import settings

    size = work.settings
    rows = size["rl_prompts"] * size["group_size"]
    return settings(work, rows, max(1, rows // size["memory_rows"]), checkpointing=checkpointing)


def trl(work: Work, *, checkpointing: bool) -> Once:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import GRPOConfig, GRPOTrainer
    from trl_steps import Stepwise, lora_config, plain_model, tokenizer

    size, reader = work.settings, tokenizer(work)
    judge = AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1, dtype=torch.float32)
    judge.config.pad_token_id = reader.pad_token_id
    prompts = [pair["prompt"] for pair in work.pairs[: size["rl_prompts"]]]
    config = GRPOConfig(
        **trl_settings(work, checkpointing=checkpointing), num_generations=size["group_size"], beta=0.04,
        max_completion_length=size["completion_tokens"], temperature=1.0,
        generation_kwargs={"min_new_tokens": size["completion_tokens"]},
    )  # fmt: skip
    tokens = sum(len(reader(p)["input_ids"]) + size["completion_tokens"] for p in prompts) * size["group_size"]
    return Stepwise(
        lambda callbacks: GRPOTrainer(
            plain_model(work), judge, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=reader, peft_config=lora_config(work), reward_processing_classes=reader,
            callbacks=callbacks,
        ),
        tokens,
    )  # fmt: skip


ROW = Row(
    "memory",
    "peak RSS with policy, reference and judge, against TRL's policy, reference and reward model",
    {"tercet": tercet, "trl": partial(trl, checkpointing=False)},
    target=2.0,
    of="rss_mb",
)
LEAST = Row(
    "memory-least",
    "the same, against what takes TRL the least: activations computed again, one, two or four rows at a time",
    {"tercet": tercet, "trl": partial(trl, checkpointing=True)},
    target=2.0,
    of="rss_mb",
    trial=Trial("trl", "memory_rows"),
)
