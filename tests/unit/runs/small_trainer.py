"""A small but real trainer, and the loop of an algorithm with it: what the tests of run folders train."""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tercet.runs import Run
from tercet.types import Weights

TOTAL_STEPS = 7
SAVE_EVERY_STEPS = 2


class WalkingTrainer:
    """Four weights that walk at random, with a momentum: they depend on every step and on the generator."""

    def __init__(self) -> None:
        self.weights = np.zeros(4, dtype=np.float32)
        self.momentum = np.zeros(4, dtype=np.float32)
        self.generator = random.Random(0)

    def step(self) -> float:
        noise = np.array([self.generator.gauss(0, 1) for _ in range(4)], dtype=np.float32)
        self.momentum = np.float32(0.9) * self.momentum + noise
        self.weights = self.weights - np.float32(0.1) * self.momentum
        return float(np.square(self.weights).sum())

    def save(self, directory: Path) -> Future[Weights]:
        save_file({"weights": self.weights}, directory / "model.safetensors")
        version, numbers, gauss = self.generator.getstate()
        state = {"momentum": self.momentum, "numbers": np.array(numbers, dtype=np.uint64)}
        save_file(state, directory / "optimizer.safetensors")
        (directory / "gauss.txt").write_text(repr((version, gauss)))
        future: Future[Weights] = Future()
        future.set_result(Weights(directory))
        return future

    def load(self, weights: Weights) -> None:
        self.weights = load_file(weights.path / "model.safetensors")["weights"]
        state = load_file(weights.path / "optimizer.safetensors")
        self.momentum = state["momentum"]
        version, _, gauss = (weights.path / "gauss.txt").read_text().strip("()").partition(", ")
        numbers = tuple(int(number) for number in state["numbers"])
        self.generator.setstate((int(version), numbers, None if gauss == "None" else float(gauss)))


def child_environment() -> dict[str, str]:
    """The environment of a child process that imports what this one imports, this file included."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def open_run(directory: Path, **settings: object) -> Run:
    """A run of the walk; settings go to `Run`."""
    chosen = {"config": {"seed": 0, "lora": {"rank": 16}}, "loggers": ()} | settings
    return Run(directory, save_every_steps=SAVE_EVERY_STEPS, total_steps=TOTAL_STEPS, stage="rl", **chosen)  # type: ignore[arg-type]


def train(run: Run, *, until: int = TOTAL_STEPS) -> None:
    """The loop of an algorithm. `until` ends it early, without a word, as a kill between two steps does."""
    trainer = WalkingTrainer()
    start = run.start()
    if start.weights is not None:
        trainer.load(start.weights)
    total = start.state.get("total", 0.0)
    for step in range(start.step, min(until, TOTAL_STEPS)):
        loss = trainer.step()
        total += loss
        run.samples(step, [{"group": 0, "index": index, "completion": f"Olé {step}"} for index in range(2)])
        run.log(step, {"loss": loss, "total": total})
        if run.save_is_due(step + 1):
            run.save(trainer, next_step=step + 1, state={"total": total})
    if until >= TOTAL_STEPS:
        run.finish(trainer, state={"total": total})
