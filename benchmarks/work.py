"""What is measured on: prompts, pairs and texts cut out of a file of preferences, the same for every side."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import Work

SIZES: dict[str, Any] = {
    "groups": 4, "group_size": 4, "prompt_tokens": (60, 250), "answer_tokens": (30, 128), "micro_batch_rows": 4,
    "rl_prompts": 4, "completion_tokens": 64, "decode_prompts": 32, "decode_samples": 4,
    "decode_batches": (32, 64, 128),
    "decode_prompt_tokens": (20, 60), "pairs": 8, "texts": 16, "text_tokens": (40, 400), "learning_rate": 1e-5,
    "rank": 16, "beta": 0.1, "match_batches": (4, 12), "trl_pieces": (1, 2, 4),
    "growth_tokens": (512, 1024, 2048, 4096),
    "growth_groups": (1, 2, 4, 8, 16), "growth_answers": 16, "growth_rows": 4,
    "growth_lengths": (128, 256, 512, 1024, 2048), "memory_rows": 4, "memory_rows_tried": (1, 2, 4), "device": "cpu",
    "dtype": "float32",
}  # fmt: skip
SMOKE: dict[str, Any] = {
    **SIZES, "groups": 2, "group_size": 2, "prompt_tokens": (5, 20), "answer_tokens": (3, 10), "rl_prompts": 2,
    "completion_tokens": 4, "decode_prompts": 3, "decode_samples": 2, "decode_batches": (2, 3),
    "decode_prompt_tokens": (3, 9), "pairs": 2, "texts": 3, "text_tokens": (5, 30), "rank": 2,
    "growth_tokens": (16, 32, 64), "growth_groups": (1, 2), "growth_answers": 2, "growth_rows": 2,
    "growth_lengths": (8, 16, 32),
}  # fmt: skip


def build(model: str, data: Path | None, *, smoke: bool, seed: int = 0) -> Work:
    """Cut the work out of a file.

    Args:
        model: Directory of the model; its tokenizer counts.
        data: Rows with `chosen` and `rejected` as in HH-RLHF, json lines, perhaps compressed; made-up ones without.
        smoke: Small sizes.
        seed: Of the lengths.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size, draw = SMOKE if smoke else SIZES, random.Random(seed)
    found = _made_up() if data is None else _read(data)
    pairs = [next(found) for _ in range(4 * size["decode_prompts"] + 64)]
    conversations = itertools.cycle(
        tokenizer.encode(pair["prompt"] + pair["chosen"], add_special_tokens=False) for pair in pairs
    )

    def cut(lengths: tuple[int, int]) -> list[int]:
        tokens, wanted = [], draw.randint(*lengths)
        while len(tokens) < wanted:
            tokens += next(conversations)
        return tokens[:wanted]

    groups = [
        {
            "prompt": cut(size["prompt_tokens"]),
            "answers": [cut(size["answer_tokens"]) for _ in range(size["group_size"])],
        }
        for _ in range(size["groups"])
    ]
    short = [pair for pair in pairs if len(tokenizer.encode(pair["prompt"] + pair["chosen"])) <= 400] or pairs
    return Work(
        model=model,
        smoke=smoke,
        settings=size,
        groups=groups,
        prompts=[cut(size["decode_prompt_tokens"]) for _ in range(size["decode_prompts"])],
        pairs=short[: max(size["pairs"], size["rl_prompts"])],
        texts=[tokenizer.decode(cut(size["text_tokens"])) for _ in range(size["texts"])],
    )


def write(work: Work, path: Path) -> None:
    """As `side.py` reads it."""
    path.write_text(json.dumps(asdict(work)))


def _read(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row = json.loads(line)
            (prompt, _, chosen), (other, _, rejected) = (
                row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
            )
            if prompt and prompt == other and chosen.strip() and rejected.strip():
                yield {"prompt": prompt + "\n\nAssistant:", "chosen": chosen, "rejected": rejected}


def _made_up() -> Iterator[dict[str, str]]:
    for i in itertools.count():
        yield {
            "prompt": f"\n\nHuman: What is number {i} good for?\n\nAssistant:",
            "chosen": f" It counts {i} things, one after another.",
            "rejected": " I would rather not say.",
        }
