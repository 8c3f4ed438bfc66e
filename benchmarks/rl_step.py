"""A whole step of reinforcement learning with a function for a reward: sample, reward, learn; against TRL's GRPO."""

from __future__ import annotations

from typing import Any

from local import datum, engine, lora
from measuring import Once, Row, Run, Work, timed


def reward(text: str) -> float:
    """How rare the letter e is: cheap, and different from answer to answer."""
    return -text.count("e") / (1 + len(text))


def tercet(work: Work) -> Once:
    from statistics import mean, pstdev

    from tercet.types import AdamParams, Batch, SamplingParams

    base = engine(work)
    tokenizer = base.loaded.tokenizer
    trainer = base.trainer(lora=lora(work))
    size = work.settings
    prompts = [tokenizer.encode(pair["prompt"], add_special_tokens=False) for pair in work.pairs[: size["rl_prompts"]]]
    adam = AdamParams(learning_rate=size["learning_rate"], max_grad_norm=1.0)
    seed = 0
    losses: list[float] = []

    def step() -> int:
        nonlocal seed
        seed += 1
        params = SamplingParams(max_tokens=size["completion_tokens"], seed=seed, eos=False)
        data = []
        groups = trainer.sampler().sample(prompts, params, size["group_size"]).result()
        for prompt, group in zip(prompts, groups, strict=True):
            rewards = [reward(str(tokenizer.decode(list(c.tokens)))) for c in group]
            middle, spread = mean(rewards), pstdev(rewards)
            for completion, each in zip(group, rewards, strict=True):
                advantage = [(each - middle) / (spread + 1e-4)] * len(completion.tokens)
                streams = {"sampling_logprobs": completion.logprobs, "advantages": advantage}
                data.append(datum(prompt, completion.tokens, **streams))
        learned = trainer.forward_backward(Batch(data), "ppo")
        trainer.optim_step(adam).result()
        losses.append(learned.result().loss)
        return sum(len(d.tokens) for d in data)

    def once() -> Run:
        # Each side draws its own answers, so losses are looked at and not compared.
        return Run(*timed(step), 0.0, {"loss": losses[-1]})

    return once


def trl(work: Work) -> Once:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl_steps import fastest, lora_config, plain_model, tokenizer

    size, reader = work.settings, tokenizer(work)
    prompts = [pair["prompt"] for pair in work.pairs[: size["rl_prompts"]]]
    rows = size["rl_prompts"] * size["group_size"]

    def rewards(completions: list[str], **_: object) -> list[float]:
        return [reward(text) for text in completions]

    def trainer(settings: dict[str, Any], callbacks: list[Any]) -> GRPOTrainer:
        # Answers are drawn for the whole step at once, and every token of it weighs the same, in whatever pieces it is
        # learned: steps_per_generation is the number of pieces, and the loss (dapo) divides by the tokens of all.
        config = GRPOConfig(
            **settings, num_generations=size["group_size"], max_completion_length=size["completion_tokens"],
            beta=0.0, temperature=1.0, generation_kwargs={"min_new_tokens": size["completion_tokens"]},
        )  # fmt: skip
        return GRPOTrainer(
            plain_model(work), rewards, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=reader, peft_config=lora_config(work), callbacks=callbacks,
        )  # fmt: skip

    tokens = sum(len(reader(p)["input_ids"]) + size["completion_tokens"] for p in prompts) * size["group_size"]
    return fastest(work, rows, trainer, tokens)


ROW = Row("rl", "whole RL step, 16 completions, function reward, against TRL GRPO", {"tercet": tercet, "trl": trl}, 3.0)
