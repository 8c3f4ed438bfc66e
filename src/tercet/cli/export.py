"""`tercet export`: weights for other tools; a reward model becomes a sequence classifier."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tercet.config import parse
from tercet.errors import UsageError
from tercet.recipes.trained import settings_at, weights_at


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a PEFT adapter, or with --merged one Hugging Face model that needs nothing else."""

    run: str = field(default="runs/rlhf", metadata={"positional": True})
    """The folder of a run, or of a whole tercet rlhf, whose RL policy is taken."""
    out: Path
    """A new directory."""
    merged: bool = False
    """Write base and adapter as one model, with its tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of a merged model's weights."""
    model: str | None = None
    """The base model; null takes the one that the run was trained on."""
    trust_remote_code: bool = False
    """Let Python files that came with the model run."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    config = parse(ExportConfig, argv, prog="tercet export")
    weights = weights_at(config.run, "run")
    if weights is None:
        raise UsageError("the base has learned nothing that could be exported; give the folder of a run")
    from tercet.models.adapters import is_adapter
    from tercet.models.export import SERVICE_FILE, export_adapter, export_classifier, export_merged, has_head

    if (weights.path / SERVICE_FILE).is_file():
        kept = json.loads((weights.path / SERVICE_FILE).read_text())["sampler"]
        raise UsageError(
            f"{config.run} was trained at a Tinker service, which keeps the weights as {kept}; fetch them from there. "
            "Those of a tercet serve lie in its --out, and tercet export takes that directory"
        )
    settings = settings_at(str(weights.path))
    # PPO's policy may have a head too, its critic's, which is of no use without the run.
    scores = is_adapter(weights.path) and has_head(weights.path) and "ppo_epochs" not in settings
    if not config.merged:
        if config.dtype != "float32":
            raise UsageError(
                f"dtype {config.dtype} is for --merged; an adapter is written as it was trained, in float32"
            )
        print(export_adapter(weights.path, config.out, keep_head=scores))
        return 0
    model = config.model or settings.get("model")
    if model is None:
        raise UsageError(f"{config.run} does not say which model it was trained on; give it with --model")
    trusted = config.trust_remote_code
    export = export_classifier if scores else export_merged
    print(export(model, weights.path, config.out, dtype=config.dtype, trust_remote_code=trusted))
    return 0
