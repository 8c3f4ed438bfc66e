"""The peers' side: a model with peft's adapter, padded batches, and trainers of TRL driven one step at a time."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from measuring import Once, Run, Work, timed

STEPS = 10_000


def tokenizer(work: Work) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(work.model)
    loaded.pad_token = loaded.pad_token or loaded.eos_token
    return loaded


def plain_model(work: Work) -> Any:
    """As transformers loads it: float32, its own attention (sdpa)."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).eval()


def lora_config(work: Work, task: str = "CAUSAL_LM") -> Any:
    from peft import LoraConfig

    rank = work.settings["rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type=task)


def peft_model(work: Work) -> Any:
    from peft import get_peft_model

    return get_peft_model(plain_model(work), lora_config(work))


def settings(work: Work, rows: int, pieces: int = 1) -> dict[str, Any]:
    """What all of TRL's trainers are given: float32, a step's rows at once or in pieces, nothing saved."""
    return {
        "output_dir": str(Path(mkdtemp())), "max_steps": STEPS, "per_device_train_batch_size": rows // pieces,
        "gradient_accumulation_steps": pieces, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "learning_rate": work.settings["learning_rate"],
        "lr_scheduler_type": "constant", "adam_beta2": 0.95, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, "dataloader_num_workers": 0,
    }  # fmt: skip


def stepwise(make_trainer: Any, tokens: int) -> Once:
    """A trainer that stops before every step until it is told to go on; it tells the loss of its first step.

    Args:
        make_trainer: Gives the trainer; called with the list of callbacks.
        tokens: Of the task, a step.
    """
    from transformers import TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)
    failures: list[BaseException] = []
    losses: list[float] = []

    class Wait(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = make_trainer([Wait()])

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            failures.append(error)
            done.release()

    threading.Thread(target=train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()
        if failures:
            raise failures[0]

    def once() -> Run:
        seconds = timed(step)[0]
        return Run(seconds, tokens, 0.0, {"first_loss": losses[0]} if losses else {})

    return once
