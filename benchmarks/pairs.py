"""A step on pairs of answers, against TRL: direct preference optimisation, and a scalar reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from local import datum, engine, lora
from measuring import Once, Row, Run, Work, timed

if TYPE_CHECKING:
    import torch


def _tokens(work: Work, tokenizer: object) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected); an answer ends with the end of the text, as TRL has it."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]  # noqa: E731
    end = [tokenizer.eos_token_id]  # type: ignore[attr-defined]
    return [
        (encode(p["prompt"]), encode(p["chosen"]) + end, encode(p["rejected"]) + end)
        for p in work.pairs[: work.settings["pairs"]]
    ]


def _total(rows: list[tuple[list[int], list[int], list[int]]]) -> int:
    return sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in rows)


def _fill_head(weight: torch.Tensor) -> None:
    """The same reward head on every side."""
    import torch

    with torch.no_grad():
        weight.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def dpo(work: Work) -> Once:
    from tercet.types import AdamParams, Batch

    base = engine(work)
    trainer, reference = base.trainer(lora=lora(work)), base.sampler()
    rows = _tokens(work, base.loaded.tokenizer)
    flat = [(prompt, answer) for prompt, chosen, rejected in rows for answer in (chosen, rejected)]
    adam = AdamParams(learning_rate=work.settings["learning_rate"], max_grad_norm=1.0)

    losses: list[float] = []

    def step() -> None:
        scored = reference.logprobs([[*p, *a] for p, a in flat], [len(p) for p, _ in flat]).result()
        data = [datum(p, a, reference_logprobs=each) for (p, a), each in zip(flat, scored, strict=True)]
        batch = Batch(data, pairs=[(i, i + 1) for i in range(0, len(data), 2)])
        learned = trainer.forward_backward(batch, "sigmoid", beta=work.settings["beta"])
        trainer.optim_step(adam).result()
        losses.append(learned.result().loss)

    def once() -> Run:
        return Run(timed(step)[0], _total(rows), 0.0, {"first_loss": losses[0]})

    return once


def trl_dpo(work: Work) -> Once:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl_steps import fastest, lora_config, plain_model, tokenizer

    reader = tokenizer(work)
    rows = work.pairs[: work.settings["pairs"]]

    def trainer(settings: dict[str, Any], callbacks: list[Any]) -> DPOTrainer:
        config = DPOConfig(**settings, beta=work.settings["beta"], max_length=None)
        return DPOTrainer(
            plain_model(work), args=config, train_dataset=Dataset.from_list(rows), processing_class=reader,
            peft_config=lora_config(work), callbacks=callbacks,
        )  # fmt: skip

    # All pairs at once take more than 20 GB: TRL keeps logits of every place of every row, padded.
    return fastest(work, len(rows), trainer, _total(_tokens(work, reader)), fewest=2)


def reward_model(work: Work) -> Once:
    from tercet.types import AdamParams, Batch, Datum, Head

    base = engine(work)
    trainer = base.trainer(lora=lora(work), head=Head())
    _fill_head(trainer.parameters["score.weight"])
    rows = _tokens(work, base.loaded.tokenizer)
    texts = [[*prompt, *answer] for prompt, chosen, rejected in rows for answer in (chosen, rejected)]
    batch = Batch(
        [Datum(tokens, [0.0] * len(tokens)) for tokens in texts],
        pairs=[(i, i + 1) for i in range(0, len(texts), 2)],
        pair_streams={"margins": [0.0] * len(rows)},
    )
    adam = AdamParams(learning_rate=work.settings["learning_rate"], max_grad_norm=1.0)

    losses: list[float] = []

    def step() -> None:
        learned = trainer.forward_backward(batch, "bradley_terry")
        trainer.optim_step(adam).result()
        losses.append(learned.result().loss)

    def once() -> Run:
        return Run(timed(step)[0], _total(rows), 0.0, {"first_loss": losses[0]})

    return once


def trl_reward(work: Work) -> Once:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    from trl_steps import fastest, lora_config, tokenizer

    reader = tokenizer(work)
    # A score is read at the last token that is no padding; padded with the end of the text, that end would not count.
    reader.pad_token = reader.bos_token
    rows = work.pairs[: work.settings["pairs"]]

    def trainer(settings: dict[str, Any], callbacks: list[Any]) -> RewardTrainer:
        model = AutoModelForSequenceClassification.from_pretrained(
            work.model, num_labels=1, dtype=getattr(torch, work.dtype)
        )
        model.config.pad_token_id = reader.pad_token_id
        _fill_head(model.score.weight)
        return RewardTrainer(
            model, args=RewardConfig(**settings, max_length=None), train_dataset=Dataset.from_list(rows),
            processing_class=reader, peft_config=lora_config(work, "SEQ_CLS"), callbacks=callbacks,
        )  # fmt: skip

    return fastest(work, len(rows), trainer, _total(_tokens(work, reader)))


DPO = Row(
    "dpo",
    "DPO step on 8 pairs, against TRL",
    {"tercet": dpo, "trl": trl_dpo},
    target=1.8,
    tolerance=1e-3,  # TRL's loss is logged with four decimals
)
REWARD = Row(
    "reward",
    "reward-model step on 8 pairs, against TRL",
    {"tercet": reward_model, "trl": trl_reward},
    target=1.8,
    tolerance=1e-3,
)
