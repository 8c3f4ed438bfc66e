"""Low-rank adapters on one base model, through peft; saved in peft's own layout."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tercet.errors import ConfigError, ModelError
from tercet.types import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAD_KEY = "base_model.model.score.weight"
"""Where peft keeps the head of a sequence classifier; a (1, D) tensor."""


def add_adapter(
    model: PreTrainedModel | peft.PeftModel, name: str, config: LoraConfig, *, base: str, seed: int
) -> peft.PeftModel:
    """Put a new adapter on the model and make it the active one; at its start it changes nothing.

    Args:
        model: The frozen base, or the base with adapters already on it.
        name: Of the new adapter.
        config: Its size and place.
        base: What `base_model_name_or_path` shall say when it is saved.
        seed: Of its random half.

    Raises:
        ConfigError: A target names no layer of the model.
    """
    # peft draws from torch's global generator; the draw must depend on the seed alone.
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number works; the annotation says int
        lora_dropout=0.0,
        target_modules=config.targets[0] if config.targets == ("all-linear",) else list(config.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        # peft warns of its own calls to transformers, and that GPT-2 keeps weights as (in, out), which it finds out.
        with warnings.catch_warnings(action="ignore"):
            if isinstance(model, peft.PeftModel):
                model.add_adapter(name, settings)
            else:
                model = peft.PeftModel(model, settings, adapter_name=name)
    except ValueError as error:
        raise ConfigError(f"no adapter could be put on {base}: {error}; see the names of its layers") from error
    finally:
        torch.random.set_rng_state(state)
    model.set_adapter(name)
    model.eval()
    return model


def remove_adapter(model: peft.PeftModel, name: str) -> None:
    """Take an adapter off the model."""
    with warnings.catch_warnings(action="ignore"):  # peft says which one is active then
        model.delete_adapter(name)


def adapter_parameters(model: peft.PeftModel, name: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of one adapter in a fixed order, by names that leave the adapter's own out, as the saved files do."""
    found = {key.replace(f".{name}.", "."): value for key, value in model.named_parameters() if f".{name}." in key}
    return dict(sorted(found.items()))


def _state(model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    # Embeddings are never trained through an adapter; looking for them would ask the hub.
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


def adapter_tensors(model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    """One adapter's tensors under peft's file keys, copied."""
    state = _state(model, name)
    return {key: value.detach().clone().contiguous() for key, value in sorted(state.items())}


def set_adapter_tensors(model: peft.PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
    """Put tensors in peft's file keys into an adapter.

    Raises:
        ModelError: The tensors are not those of this adapter.
    """
    wanted = _state(model, name)
    tensors = {key: tensor for key, tensor in tensors.items() if key != HEAD_KEY}
    if wanted.keys() != tensors.keys() or any(wanted[key].shape != tensors[key].shape for key in wanted):
        raise ModelError(
            f"the saved adapter has {len(tensors)} tensors, the adapter here {len(wanted)}, or their shapes differ; "
            "rank, targets and base model must be those it was trained with"
        )
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(tensors[key])


def save_adapter(model: peft.PeftModel, name: str, directory: Path, head: Tensor | None = None) -> None:
    """Write one adapter in peft's layout: `adapter_config.json` and `adapter_model.safetensors`.

    With a head (1, D) it is that of a sequence classifier, which transformers and peft load as one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(model, name)
    if head is not None:
        tensors[HEAD_KEY] = head.detach().cpu().contiguous()
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    if head is not None:
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]  # type: ignore[attr-defined]
    config.save_pretrained(str(directory))


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors of an adapter in peft's layout; that of a classifier has `HEAD_KEY` among them.

    Raises:
        ModelError: The directory holds no LoRA adapter.
    """
    if not is_adapter(directory):
        raise ModelError(f"{directory} holds no adapter: {CONFIG_FILE} and {WEIGHTS_FILE} were expected")
    settings = json.loads((directory / CONFIG_FILE).read_text())
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{directory} holds a {settings.get('peft_type')} adapter; only LORA can be used")
    targets = settings["target_modules"]
    config = LoraConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
    )
    return config, load_file(directory / WEIGHTS_FILE)


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds an adapter in peft's layout."""
    return (directory / CONFIG_FILE).is_file() and (directory / WEIGHTS_FILE).is_file()


Update = tuple[Tensor, Tensor, float]
"""B, A and a scale: the weight grows by scale x B A."""


def weight_updates(config: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, Update]:
    """For each adapted layer of the base, by its name there, (B, A, scale): its weight grows by scale x B A."""
    prefix, down = "base_model.model.", ".lora_A.weight"
    return {
        key.removeprefix(prefix).removesuffix(down): (
            tensors[key.replace(".lora_A.", ".lora_B.")],
            tensors[key],
            config.alpha / config.rank,
        )
        for key in tensors
        if key.endswith(down)
    }


def merged(layer: torch.nn.Module, weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The layer's weight with an update worked in: W + scale x B A, in the layer's orientation, summed in float32."""
    update = up.float() @ down.float()
    if isinstance(layer, Conv1D):  # GPT-2 keeps (in, out)
        update = update.T
    return torch.add(weight.float(), update, alpha=scale).to(weight.dtype)
