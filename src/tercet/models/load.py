"""A Hugging Face model made ready: frozen, without dropout, with tercet's attention where it takes that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tercet.errors import ModelError
from tercet.models import tree_attention
from tercet.models.cpu import fast_dtype
from tercet.models.memory import read_shape
from tercet.models.names import resolve
from tercet.models.padded import has_plain_head
from tercet.models.quiet import quiet
from tercet.models.takes_tree import context_tokens, require_rows, why_no_tree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Smaller models spend their time elsewhere than in products.
BFLOAT16_WEIGHTS = 50_000_000
DROPOUT = re.compile(r"drop(out|path)?(_prob|_rate)?$|pdrop$")


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, the name it was asked for by, and the directory it came from."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    path: Path
    why_no_tree: str | None = None
    """Why it computes right-padded rows and no packed forest, in words that follow its name; None when it does."""
    plain_head: bool = True
    """Whether its logits are what its linear head gives, and nothing more."""

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model takes."""
        return context_tokens(self.model.config)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: the tokenizer's and the generation config's, which may list several."""
        generation = getattr(self.model.generation_config, "eos_token_id", None)
        listed = generation if isinstance(generation, list) else [generation]
        return tuple(sorted({int(i) for i in [self.tokenizer.eos_token_id, *listed] if i is not None}))


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model; it needs neither a padding nor a beginning token.

    Raises:
        ModelError: There is no such model, or it has no tokenizer that can be read.
    """
    return _tokenizer(resolve(name, trust_remote_code=trust_remote_code, weights=False), name, trust_remote_code)


def load_context_tokens(name: str, *, trust_remote_code: bool = False) -> int:
    """The longest sequence a model takes, by its config; no weights are needed.

    Raises:
        ModelError: There is no such model, or its config cannot be read.
    """
    path = resolve(name, trust_remote_code=trust_remote_code, weights=False)
    return context_tokens(_config(path, name, trust_remote_code))


def load_model(
    name: str, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """The model frozen and in evaluation mode, every dropout 0, attention by `tercet.models.tree_attention`.

    A model that takes no packed forest keeps transformers' eager attention, the one that every architecture has in
    full, and is tried with right-padded rows.

    Args:
        name: See `resolve`.
        dtype: float32, bfloat16, float16, or auto (see `fitting_dtype`); whatever the file has is converted.
        device: cpu, cuda (or cuda:1 ...), or auto: cuda where there is one.
        trust_remote_code: Let Python files that came with the model run.

    Raises:
        ModelError: The model is not there, not whole, or cannot compute sequences side by side; or there is no such
            device.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(DTYPES)}")
    place = _device(device)
    path = resolve(name, trust_remote_code=trust_remote_code)
    if dtype == "auto":
        dtype = fitting_dtype(path, place)
    config = _config(path, name, trust_remote_code)
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    no_tree = why_no_tree(config, own_code=own_code)
    if no_tree is not None:
        require_rows(config, name)
    tokenizer = _tokenizer(path, name, trust_remote_code)
    _no_dropout_config(config)
    try:
        with quiet():
            load: Any = AutoModelForCausalLM.from_pretrained
            model, info = load(
                path, config=config, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True,
                attn_implementation=tree_attention.NAME if no_tree is None else "eager",
                trust_remote_code=trust_remote_code, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"{name} could not be loaded from {path}: {error}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        # transformers would make them up at random.
        raise ModelError(
            f"{name} lacks {len(absent)} of its weights in {path} (among them {', '.join(absent[:3])}); "
            "fetch or save it again"
        )
    _no_dropout(model)
    model.requires_grad_(False)
    model.eval()
    model = model.to(place)
    plain_head = no_tree is None or has_plain_head(model, name)
    return LoadedModel(model, tokenizer, name, path, no_tree, plain_head)


def fitting_dtype(path: Path, device: torch.device) -> str:
    """bfloat16 where products of it are fast and products are what takes the time; else float32."""
    if device.type == "cpu":
        try:
            large = read_shape(path).parameters >= BFLOAT16_WEIGHTS
        except ModelError:
            large = False
        if not large:
            return "float32"
    return fast_dtype(device.type)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ModelError(f"device is {device!r}; it must be cpu, cuda, cuda:<number> or auto")
    place = torch.device(device)
    if (place.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device is {device}, but torch sees {torch.cuda.device_count()} GPUs; use cpu or auto")
    return place


def _config(path: Path, name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
            return config
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the config of {name} in {path} cannot be read: {error}") from error


def _tokenizer(path: Path, name: str, trust_remote_code: bool) -> Tokenizer:
    try:
        with quiet():
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{name} has no tokenizer that can be read in {path}: {error}") from error
    # Lengths are checked against the context where they matter; transformers would warn at the first long text.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if len(tokenizer) == 0:
        raise ModelError(f"{name} has no tokenizer in {path}; copy tokenizer.json and tokenizer_config.json there")
    return tokenizer


def _no_dropout_config(config: PretrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if DROPOUT.search(key) and isinstance(value, float):
            setattr(config, key, 0.0)


def _no_dropout(model: nn.Module) -> None:
    """Evaluation mode switches dropout off too, but peft and checkpointing can put parts back into training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in list(vars(module).items()):
            if DROPOUT.search(key) and isinstance(value, float):
                setattr(module, key, 0.0)
