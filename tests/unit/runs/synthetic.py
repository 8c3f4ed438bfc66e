"""A pipeline's folder as `tercet rlhf` leaves it, with made-up numbers that look like those of a real run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from small_trainer import WalkingTrainer

from tercet.runs import Run

PROMPTS = (
    "How do I keep basil alive on a windowsill?",
    "Explain in two sentences why the sky is blue.",
    "My flight is cancelled. What should I do first?",
    "Write a polite note to a neighbour about loud music.",
    "What is 15% of 240?",
    "Give me three names for a small bakery.",
)
TRICKY = "<script>alert('run')</script> & <b>bold</b> https://example.org/page"


def write_stage(directory: Path, stage: str, steps: int, metrics: list[dict[str, float]], **settings: object) -> None:
    """One finished stage, through a real `Run`."""
    config = {"model": "smollm2-135m", "steps": steps, "learning_rate": 2e-4, "note": TRICKY} | settings
    with Run(directory, config=config, save_every_steps=0, total_steps=steps, stage=stage, loggers=()) as run:
        run.start()
        for step, row in enumerate(metrics):
            run.log(step, row)
            if stage == "rl":
                run.samples(step, sampled(step))
        run.finish(WalkingTrainer())


def write_pipeline(root: Path, *, sft_steps: int = 60, judge_steps: int = 80, rl_steps: int = 40) -> None:
    """All stages and the evaluation."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text("model: smollm2-135m\nseed: 0\nsft:\n  learning_rate: 0.0002\nrl:\n  group: 4\n")
    write_stage(root / "sft", "sft", sft_steps, sft_metrics(sft_steps))
    write_stage(root / "preference", "preference", judge_steps, judge_metrics(judge_steps, best=0.88, seed=1))
    write_stage(root / "judge", "judge", judge_steps, judge_metrics(judge_steps, best=0.84, seed=2))
    write_stage(root / "rl", "rl", rl_steps, rl_metrics(rl_steps))
    (root / "evaluation.json").write_text(json.dumps(evaluation()))


def sft_metrics(steps: int) -> list[dict[str, float]]:
    draw = random.Random(0)
    rows = []
    for step in range(steps):
        nll = 1.62 + 0.7 * math.exp(-step / (steps / 4))
        row = {
            "loss": nll + draw.gauss(0, 0.08),
            "train_mean_nll": nll + draw.gauss(0, 0.08),
            "learning_rate": 2e-4 * (1 - step / steps),
            "grad_norm": 1.1 + draw.gauss(0, 0.15),
            "num_tokens": 2048,
        }
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            row |= {"test/nll": nll + 0.05, "test/bpb": (nll + 0.05) / 3.1}
        rows.append(row)
    return rows


def judge_metrics(steps: int, *, best: float, seed: int) -> list[dict[str, float]]:
    draw = random.Random(seed)
    rows = []
    for step in range(steps):
        learned = 1 - math.exp(-step / (steps / 4))
        accuracy = 0.5 + (best - 0.5) * learned
        row = {
            "loss": 0.7 - 0.38 * learned + draw.gauss(0, 0.05),
            "accuracy": min(1.0, max(0.0, accuracy + draw.gauss(0, 0.07))),
            "grad_norm": 3 + draw.gauss(0, 0.6),
        }
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            row |= {
                "test/nll": 0.7 - 0.36 * learned,
                "test/accuracy": accuracy,
                "test/accuracy_both": accuracy + 0.02,
                "test/ece": 0.03 + 0.08 * (1 - learned),
                "test/flip_rate": 0.06 + 0.6 * (1 - learned),
                "test/accuracy_short_chosen": accuracy - 0.06,
                "test/accuracy_long_chosen": accuracy + 0.05,
            }
        rows.append(row)
    return rows


def rl_metrics(steps: int) -> list[dict[str, float]]:
    draw = random.Random(3)
    rows = []
    for step in range(steps):
        learned = step / steps
        row = {
            "reward": -0.12 + 0.1 * learned + draw.gauss(0, 0.02),
            "reward_std": 0.35 - 0.1 * learned + draw.gauss(0, 0.02),
            "frac_reward_zero_std": 0.05 * learned,
            "kl": 0.09 * learned**1.3 + abs(draw.gauss(0, 0.002)),
            "entropy": 1.4 - 0.5 * learned + draw.gauss(0, 0.03),
            "completions/mean_length": 46 - 9 * learned + draw.gauss(0, 1.5),
            "completions/mean_terminated_length": 43 - 8 * learned + draw.gauss(0, 1.5),
            "completions/clipped_ratio": max(0.0, 0.14 - 0.12 * learned + draw.gauss(0, 0.02)),
            "judge/flip_rate": 0.12 + draw.gauss(0, 0.02),
            "reward_length_correlation": -0.1 + draw.gauss(0, 0.08),
            "grad_norm": 0.8 + draw.gauss(0, 0.1),
            "kl_sample_train_v1": draw.gauss(0, 2e-6),
            "kl_sample_train_v2": abs(draw.gauss(0, 1e-6)),
            "time/step_s": 6.0,
        }
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            for prefix, best in (("test/win_rate", 0.77), ("test/held_out/win_rate", 0.71)):
                rate = 0.5 + (best - 0.5) * (1 - math.exp(-3 * learned)) + draw.gauss(0, 0.012)
                row |= {
                    prefix: rate,
                    f"{prefix}_stderr": 0.03,
                    f"{prefix}_low": rate - 0.06,
                    f"{prefix}_high": rate + 0.06,
                }
        rows.append(row)
    return rows


def sampled(step: int) -> list[dict[str, object]]:
    draw = random.Random(step)
    rows: list[dict[str, object]] = []
    for group in range(4):
        for index in range(4):
            tokens = draw.randint(8, 64)
            reward = draw.gauss(0.2 - 0.006 * tokens, 0.3)
            rows.append(
                {
                    "group": group,
                    "index": index,
                    "prompt": [{"role": "user", "content": PROMPTS[group]}],
                    "completion": f"Answer {index} of {tokens} tokens. "
                    + ("Put it where the sun comes in. " * (tokens // 12)),
                    "reward": reward,
                    "advantage": reward - 0.1,
                    "tokens": tokens,
                    "stop_reason": "eos",
                }
            )
    return rows


def evaluation() -> dict[str, object]:
    calibration = [
        {"confidence": 0.55 + 0.1 * i, "accuracy": 0.52 + 0.105 * i, "n": n} for i, n in enumerate((6, 9, 14, 20, 31))
    ]
    judge = {
        "nll": 0.31, "accuracy": 0.8775, "accuracy_both": 0.8875, "ece": 0.034, "flip_rate": 0.0625,
        "accuracy_short_chosen": 0.83, "accuracy_long_chosen": 0.93, "n": 80, "calibration": calibration,
    }  # fmt: skip
    watching = judge | {
        "accuracy": 0.8375,
        "accuracy_both": 0.8475,
        "flip_rate": 0.0875,
        "calibration": [row | {"accuracy": row["accuracy"] - 0.06} for row in calibration],
    }
    results = (
        ("rl", "sft", "preference", 0.764, 0.703, 0.825),
        ("rl", "sft", "held_out", 0.707, 0.642, 0.772),
        ("rl", "chosen", "preference", 0.442, 0.371, 0.513),
        ("sft", "base", "preference", 0.681, 0.614, 0.748),
    )
    names = ("policy", "against", "judge", "win_rate", "low", "high")
    answers = {
        "base": "Basil is a plant. Basil is a plant that grows. Plants grow in many places, and basil is one of the",
        "sft": f"Give it light and water it when the soil feels dry. {TRICKY}",
        "rl": "Put it where the sun falls for six hours, water it when the soil is dry,\nand pinch its tips.",
    }
    return {
        "win_rates": [dict(zip(names, row, strict=True)) | {"stderr": 0.03, "n": 120} for row in results],
        "judges": {"preference": judge, "held_out": watching},
        "policies": {
            "base": {"mean_length": 58.2, "clipped_ratio": 0.41, "entropy": 1.52, "kl": 0.21},
            "sft": {"mean_length": 45.8, "clipped_ratio": 0.12, "entropy": 1.38, "kl": 0.0},
            "rl": {"mean_length": 37.4, "clipped_ratio": 0.02, "entropy": 0.93, "kl": 0.087},
        },
        "samples": [{"prompt": [{"role": "user", "content": prompt}], "answers": answers} for prompt in PROMPTS],
    }
