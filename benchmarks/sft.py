"""Supervised fine-tuning on texts of mixed lengths, every token learned: against TRL without packing; and the rate of
arithmetic."""

from __future__ import annotations

from typing import Any

from local import engine, learning_flops, lora
from measuring import Once, Row, Run, Work, timed


def tercet(work: Work) -> Once:
    from tercet.types import AdamParams, Batch, Datum

    base = engine(work)
    trainer = base.trainer(lora=lora(work))
    texts = [base.loaded.tokenizer.encode(text, add_special_tokens=False) for text in work.texts]
    batch = Batch([Datum(tokens, [0.0, *[1.0] * (len(tokens) - 1)]) for tokens in texts])
    tokens = sum(map(len, texts))
    flops = learning_flops(base.model, texts, tokens - len(texts))
    adam = AdamParams(learning_rate=work.settings["learning_rate"], max_grad_norm=1.0)

    losses = []

    def step() -> None:
        learned = trainer.forward_backward(batch, "cross_entropy")
        trainer.optim_step(adam).result()
        losses.append(learned.result().loss)

    def once() -> Run:
        return Run(timed(step)[0], tokens, flops, {"first_loss": losses[0]})

    return once


def trl(work: Work) -> Once:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl_steps import fastest, lora_config, plain_model, tokenizer

    reader = tokenizer(work)
    texts = [reader.encode(text, add_special_tokens=False) for text in work.texts]

    def trainer(settings: dict[str, Any], callbacks: list[Any]) -> SFTTrainer:
        config = SFTConfig(**settings, packing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        return SFTTrainer(
            plain_model(work), args=config, train_dataset=Dataset.from_dict({"input_ids": texts, "labels": texts}),
            processing_class=reader, peft_config=lora_config(work), callbacks=callbacks,
        )  # fmt: skip

    return fastest(work, len(texts), trainer, sum(map(len, texts)))


ROW = Row(
    "sft",
    "SFT step, 16 texts of mixed lengths, against TRL without packing",
    {"tercet": tercet, "trl": trl},
    target=1.5,
    tolerance=1e-3,  # TRL's loss is logged with four decimals
)
ARITHMETIC = Row(
    "arithmetic", "training arithmetic over the GEMM peak (SFT)", {"tercet": tercet}, 0.70, of="arithmetic"
)
