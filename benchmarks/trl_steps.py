"""The peers' side: a model with peft's adapter, padded batches, and trainers of TRL driven one step at a time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from measuring import Run, Work, timed

STEPS = 10_000


def tokenizer(work: Work) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(work.model)
    loaded.pad_token = loaded.pad_token or loaded.eos_token
    return loaded


def plain_model(work: Work) -> Any:
    """As transformers loads it: in the work's dtype, its own attention (sdpa)."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype)).to(work.device).eval()


def lora_config(work: Work, task: str = "CAUSAL_LM") -> Any:
    from peft import LoraConfig

    rank = work.settings["rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type=task)


def peft_model(work: Work) -> Any:
    from peft import get_peft_model

    return get_peft_model(plain_model(work), lora_config(work))


def settings(work: Work, rows: int, pieces: int = 1, *, checkpointing: bool = False) -> dict[str, Any]:
    """What all of TRL's trainers are given: the work's dtype, a step's rows at once or in pieces, nothing saved.

    With `checkpointing` activations are computed again on the way back: slower, and what saves TRL the most memory.
    """
    return {
        "output_dir": str(Path(mkdtemp())), "max_steps": STEPS, "per_device_train_batch_size": rows // pieces,
        "gradient_accumulation_steps": pieces, "use_cpu": work.device == "cpu", "bf16": work.dtype == "bfloat16",
        "gradient_checkpointing": checkpointing, "learning_rate": work.settings["learning_rate"],
        "lr_scheduler_type": "constant", "adam_beta2": 0.95, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, "dataloader_num_workers": 0,
    }  # fmt: skip


def fastest(
    work: Work,
    rows: int,
    make_trainer: Callable[[dict[str, Any], list[Any]], Any],
    tokens: int,
    *,
    fewest: int = 1,
) -> Stepwise:
    """A trainer in the fastest of some ways to cut a step's rows, smaller pieces first, until larger are slower.

    The gradient of a step is the same: TRL weighs pieces so that they add up to the whole.

    Args:
        work: Its `trl_pieces` are tried, as far as they divide the rows.
        rows: Of one step.
        make_trainer: Gives a trainer; called with its settings and the list of callbacks.
        tokens: Of the task, a step.
        fewest: Pieces.
    """
    best: Stepwise | None = None
    least = float("inf")
    for pieces in sorted((n for n in work.settings["trl_pieces"] if n >= fewest and rows % n == 0), reverse=True):
        trainer = Stepwise(partial(make_trainer, settings(work, rows, pieces)), tokens)
        if best is None:
            trainer()  # what is done once in a process is not this one's alone
        seconds = trainer().seconds
        slower = seconds >= least
        worse = trainer if slower else best
        if worse is not None:
            worse.end()
        if slower:
            break
        best, least = trainer, seconds
    assert best is not None
    return best


class Ended(Exception):
    """A trainer is to go no further."""


class Stepwise:
    """A trainer that stops before every step until it is told to go on; it tells the loss of its first step."""

    def __init__(self, make_trainer: Callable[[list[Any]], Any], tokens: int) -> None:
        """Get ready.

        Args:
            make_trainer: Gives the trainer; called with the list of callbacks.
            tokens: Of the task, a step.
        """
        from transformers import TrainerCallback

        self.tokens = tokens
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failures: list[BaseException] = []
        self.losses: list[float] = []
        self.ended = False
        steps = self

        class Wait(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                steps.go.acquire()
                if steps.ended:
                    raise Ended

            def on_step_end(self, *_: Any, **__: Any) -> None:
                steps.done.release()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                steps.losses.extend([logs["loss"]] if "loss" in logs else [])

        self.thread = threading.Thread(target=self._train, args=(make_trainer([Wait()]),), daemon=True)
        self.thread.start()

    def _train(self, trainer: Any) -> None:
        try:
            trainer.train()
        except BaseException as error:
            self.failures.append(error)
            self.done.release()

    def __call__(self) -> Run:
        """One step."""
        seconds = timed(self._step)[0]
        return Run(seconds, self.tokens, 0.0, {"first_loss": self.losses[0]} if self.losses else {})

    def _step(self) -> None:
        self.go.release()
        self.done.acquire()
        if self.failures:
            raise self.failures[0]

    def end(self) -> None:
        """Let go of the trainer and its memory."""
        self.ended = True
        self.go.release()
        self.thread.join()
        self.failures.clear()  # its traceback holds the trainer
        gc.collect()
