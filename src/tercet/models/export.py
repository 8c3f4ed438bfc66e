"""Trained weights for others to use: an adapter in peft's layout, or a merged model that plain transformers loads."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tercet.errors import ModelError, UsageError
from tercet.models import smollm2
from tercet.models.adapters import (
    CONFIG_FILE,
    HEAD_KEY,
    WEIGHTS_FILE,
    is_adapter,
    merged,
    read_adapter,
    weight_updates,
)
from tercet.models.directories import new_directory
from tercet.models.names import hub_id, resolve
from tercet.models.quiet import quiet
from tercet.types import LoraConfig

# What stands for weights that a service keeps; see `tercet.engine.remote`.
SERVICE_FILE = "tinker.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_weights(directory: Path) -> Path:
    """The directory of the newest weights in a run, a checkpoint, or a `tercet rlhf` folder (its RL stage first).

    Raises:
        UsageError: There are none.
    """
    if _holds_weights(directory):
        return directory
    # Names end in the zero-padded step, so that their order is the order of the steps.
    for checkpoint in sorted((directory / "checkpoints").glob("step-[0-9]*"), reverse=True):
        for inside in [checkpoint, *sorted(path for path in checkpoint.iterdir() if path.is_dir())]:
            if _holds_weights(inside):
                return inside
    for stage in ("rl", "sft"):
        if (directory / stage).is_dir():
            return find_weights(directory / stage)
    raise UsageError(
        f"{directory} holds no trained weights: a run with checkpoints, or a directory with {CONFIG_FILE} was wanted"
    )


def _holds_weights(directory: Path) -> bool:
    return is_adapter(directory) or any((directory / name).is_file() for name in ("config.json", SERVICE_FILE))


def export_adapter(source: Path, out: Path, *, keep_head: bool = True) -> Path:
    """Copy an adapter, with its base named as others can find it, and a model card.

    Args:
        source: A run's folder, or an adapter's directory.
        out: A new directory.
        keep_head: Whether a head belongs to it: a reward model's does, a policy's value head does not.

    Raises:
        UsageError: There is no adapter in `source`, or `out` is not empty.
    """
    weights = find_weights(source)
    if not is_adapter(weights):
        raise UsageError(f"{weights} holds a whole model, not an adapter; export it merged")
    settings = json.loads((weights / CONFIG_FILE).read_text())
    base = settings.get("base_model_name_or_path") or ""
    settings["base_model_name_or_path"] = hub_id(base) or _here(base)
    with new_directory(out) as making:
        if has_head(weights) and not keep_head:
            settings |= _write_without_head(weights, making)
        else:
            shutil.copy(weights / WEIGHTS_FILE, making / WEIGHTS_FILE)
        (making / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (making / "README.md").write_text(_card(settings, base))
    return out


def export_merged(
    model_name: str, source: Path, out: Path, *, dtype: str = "float32", trust_remote_code: bool = False
) -> Path:
    """Write base and adapter as one Hugging Face model, with tokenizer, chat template and generation config.

    The sum W + alpha / rank x B A is taken in float32 and rounded to `dtype` once. Where an adapter sits on the head or
    the embedding of a model in which both share their weights, they are written apart.

    Args:
        model_name: The base; see `resolve`.
        source: A run's folder, an adapter's directory, or that of a wholly trained model, written as it is.
        out: A new directory.
        dtype: Of the weights: float32, bfloat16 or float16.
        trust_remote_code: Let Python files that came with the model run.

    Raises:
        ModelError: The adapter does not fit the model.
        UsageError: There are no weights in `source`, `out` is not empty, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    weights = find_weights(source)
    base = resolve(model_name, trust_remote_code=trust_remote_code)
    with new_directory(out) as making, quiet():
        model: Any = _plain(base if is_adapter(weights) else weights, trust_remote_code)
        if is_adapter(weights):
            model = _merged(model, weights, model_name)
        model.to(DTYPES[dtype]).save_pretrained(making)
        _copy_tokenizer(base, making, trust_remote_code)
    return out


def export_classifier(
    model_name: str, source: Path, out: Path, *, dtype: str = "float32", trust_remote_code: bool = False
) -> Path:
    """Write a reward model as a sequence classifier with one label: base, adapter and head (`score`) as one model.

    transformers reads the score at the last token that is not padding, by its id; so the tokenizer written beside it
    pads with a special token that ends no text.

    Args:
        model_name: The base; see `resolve`.
        source: A run's folder, or an adapter's directory, with a head.
        out: A new directory.
        dtype: Of the weights: float32, bfloat16 or float16.
        trust_remote_code: Let Python files that came with the model run.

    Raises:
        ModelError: The adapter does not fit the model, or no token is left to pad with.
        UsageError: There is no adapter with a head in `source`, `out` is not empty, or the dtype is unknown.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    weights = find_weights(source)
    config, tensors = read_adapter(weights) if is_adapter(weights) else (LoraConfig(), {})
    head = tensors.get(HEAD_KEY)
    if head is None:
        raise UsageError(f"{weights} has no adapter with a head, so it is no reward model; give a run of tercet reward")
    base = resolve(model_name, trust_remote_code=trust_remote_code)
    places: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with new_directory(out) as making, quiet():
        tokenizer = AutoTokenizer.from_pretrained(base, **places)
        pad = _pad_token(tokenizer)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, **places
        )
        try:
            with torch.no_grad():
                for layer, update in weight_updates(config, tensors).items():
                    module = model.get_submodule(layer)
                    module.weight.copy_(merged(module, module.weight, *update))
                model.score.weight.copy_(head)
        except (AttributeError, RuntimeError) as error:
            raise ModelError(f"the adapter in {weights} does not fit {model_name}: {error}") from error
        model.config.pad_token_id, model.config.problem_type = tokenizer.convert_tokens_to_ids(pad), "regression"
        tokenizer.pad_token = pad
        model.to(DTYPES[dtype]).save_pretrained(making)
        tokenizer.save_pretrained(making)
    return out


def _pad_token(tokenizer: Any) -> str:
    """A special token that is in no conversation, so that none is taken for padding at its end."""
    used: set[int] = set()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
        used = set(tokenizer.apply_chat_template(turns, return_dict=False))
    spare = [token for i, token in sorted(tokenizer.added_tokens_decoder.items()) if i not in used and token.special]
    if not spare:
        raise ModelError("every special token of the tokenizer is in use, and one is wanted for padding; add one to it")
    return str(spare[0])


def _plain(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=trust_remote_code
    )


def has_head(weights: Path) -> bool:
    """Whether an adapter was saved with a head, as a sequence classifier."""
    return bool(json.loads((weights / CONFIG_FILE).read_text()).get("task_type") == "SEQ_CLS")


def _write_without_head(weights: Path, out: Path) -> dict[str, Any]:
    """An adapter's tensors but for its head, and what its settings say differently then."""
    tensors = {key: tensor for key, tensor in load_file(weights / WEIGHTS_FILE).items() if key != HEAD_KEY}
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    return {"task_type": "CAUSAL_LM", "modules_to_save": None}


def _merged(model: Any, adapter: Path, model_name: str) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    if has_head(adapter):
        # A policy learned beside its critic: peft would look for the critic's head on a language model.
        with TemporaryDirectory() as name:
            settings = json.loads((adapter / CONFIG_FILE).read_text()) | _write_without_head(adapter, Path(name))
            (Path(name) / CONFIG_FILE).write_text(json.dumps(settings))
            return _merged(model, Path(name), model_name)
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
        keys = set(file.keys())
    if _shares_head(model) and any("embed" in key or "lm_head" in key or "wte" in key for key in keys):
        # Added to the shared matrix, an update meant for one of the two would change the other as well.
        model.set_output_embeddings(_copy_of(model.get_output_embeddings()))
        model.config.tie_word_embeddings = False
    try:
        # peft warns of keys it misses, of tied heads and of its own calls; what matters of that is checked below.
        with warnings.catch_warnings(action="ignore"):
            wrapped = PeftModel.from_pretrained(model, str(adapter))
            wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"the adapter in {adapter} does not fit {model_name}: {error}") from error
    if keys != wanted:
        odd = sorted(keys ^ wanted)[0]
        raise ModelError(
            f"the adapter in {adapter} does not fit {model_name}: it has {len(keys)} tensors where {len(wanted)} are "
            f"wanted ({odd} is in one and not in the other); give the base it was trained on"
        )
    return wrapped.merge_and_unload(safe_merge=True)


def _shares_head(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()


def _copy_of(head: nn.Linear) -> nn.Linear:
    own = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, dtype=head.weight.dtype)
    own.load_state_dict(head.state_dict())
    return own


def _copy_tokenizer(base: Path, out: Path, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=trust_remote_code).save_pretrained(out)
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, out / generation.name)


def _here(base: str) -> str:
    path = Path(base).expanduser()
    return str(path.resolve()) if base and path.exists() else base


def _card(settings: dict[str, Any], base: str) -> str:
    name = settings["base_model_name_or_path"]
    path = Path(base).expanduser()
    origin = smollm2.source(path if path.is_dir() else smollm2.place()) if hub_id(base) == smollm2.HUB_ID else None
    trained_on = f"\nIt was trained on this copy of the base: {origin}.\n" if origin else ""
    on_hub = hub_id(base) is not None
    scores = settings.get("task_type") == "SEQ_CLS"
    kind = "SequenceClassification" if scores else "CausalLM"
    return f"""---
{f"base_model: {name}" if on_hub else "# The base model is on no hub."}
library_name: peft
pipeline_tag: {"text-classification" if scores else "text-generation"}
tags:
- lora
- tercet
---

# A LoRA adapter on {name if on_hub else Path(name).name}

Rank {settings["r"]}, alpha {settings["lora_alpha"]}, trained with tercet.
{trained_on}
```python
from peft import AutoPeftModelFor{kind}

model = AutoPeftModelFor{kind}.from_pretrained("<this directory>"{", num_labels=1" if scores else ""})
```
"""
