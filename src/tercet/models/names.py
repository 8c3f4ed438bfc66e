"""From what a user types after `--model` to a directory that holds the model."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tercet.errors import ModelError
from tercet.models import smollm2, tiny

# Weights and what describes them. Pickled weights (*.bin, *.pt) can run code when read: they are never fetched.
WEIGHTS = "*.safetensors"
HUB_FILES = (WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
HUB_LEFT_OUT = ("*/*", "consolidated*", "adapter_*")


@dataclass(frozen=True)
class BuiltIn:
    """A model that tercet can fetch or make by itself."""

    make: Callable[[], Path]
    hub_id: str | None
    about: str


BUILTIN = {
    "smollm2-135m": BuiltIn(
        smollm2.fetch, smollm2.HUB_ID, "SmolLM2-135M-Instruct, Apache-2.0: a real model small enough for two CPU cores"
    ),
    "tiny": BuiltIn(
        tiny.fetch, None, "two random layers and a tokenizer made on the spot: for trying things, knows nothing"
    ),
}


def resolve(name: str, *, trust_remote_code: bool = False, weights: bool = True) -> Path:
    """The directory of a model; fetched into a cache first where it must be.

    Args:
        name: A built-in name, a local directory, or a hub id such as `Qwen/Qwen3-0.6B`; the first of these that it is.
        trust_remote_code: Fetch the model's own Python files too.
        weights: Whether they are needed; without, neither are they fetched from the hub nor must a directory have them.

    Raises:
        ModelError: There is no such model, it cannot be fetched, or it is not a whole model.
    """
    if name in BUILTIN:
        return checked(BUILTIN[name].make(), name)
    local = Path(name).expanduser()
    if local.is_dir():
        return checked(local, name) if weights else local
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise ModelError(f"there is no directory {local}; a model is {_choices()}")
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.75)
    if near:
        raise ModelError(f"there is no model {name!r}; did you mean {near[0]}?")
    found = _from_hub(name, trust_remote_code, weights)
    return checked(found, name) if weights else found


def checked(directory: Path, name: str) -> Path:
    """The directory itself, once it is known to hold a whole model with safetensors weights.

    Raises:
        ModelError: Something is missing; the message says what was found and what was wanted.
    """
    found = sorted(path.name for path in directory.iterdir())
    if "config.json" not in found:
        if "adapter_config.json" in found:
            base = json.loads((directory / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise ModelError(f"{name} is an adapter on {base}, not a model; give its base as the model")
        raise ModelError(f"{name} has no config.json, so it is no model directory; found there: {_listed(found)}")
    wanted = {path for path in found if path.endswith(".safetensors")}
    if not wanted:
        pickled = [path for path in found if path.endswith((".bin", ".pt", ".pth"))]
        what = f"only pickled weights ({_listed(pickled)}), which are never read" if pickled else "no weights"
        raise ModelError(
            f"{name} has {what}; safetensors weights are wanted: save it again with save_pretrained, or take a "
            "revision of the model that has them"
        )
    for index in (path for path in found if path.endswith(".safetensors.index.json")):
        wanted |= set(json.loads((directory / index).read_text())["weight_map"].values())
    absent = sorted(wanted - {path for path in found if (directory / path).exists()})
    if absent:
        raise ModelError(f"{name} is not whole: {_listed(absent)} is missing in {directory}; fetch it again")
    return directory


def hub_id(name: str) -> str | None:
    """The hub id of a model given by name or by the place it was cached in; None for a model that is only here."""
    if name in BUILTIN:
        return BUILTIN[name].hub_id
    path = Path(name).expanduser()
    for part in path.parts:
        if part.startswith("models--") and part.count("--") >= 1:
            return part.removeprefix("models--").replace("--", "/")
    if path.is_dir():
        made = [
            built.hub_id for built in BUILTIN.values() if built.hub_id and path.resolve() == smollm2.place().resolve()
        ]
        return made[0] if made else None
    return name if re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) else None


def _from_hub(name: str, trust_remote_code: bool, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    files = [each for each in HUB_FILES if weights or each != WEIGHTS] + (["*.py"] if trust_remote_code else [])
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=list(HUB_LEFT_OUT)))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on its page at the hub, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"the hub has no model {name!r}, or it is private and HF_TOKEN is not set; a model is {_choices()}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"there is no directory {name!r} here, and the hub cannot be reached for a model of that name "
            f"({_first_line(error)}). Connect, or unset HF_HUB_OFFLINE; or set HF_ENDPOINT to a mirror; or copy the "
            "model to this machine and give its directory; or take the built-in smollm2-135m"
        ) from error
    except Exception as error:
        # The hub's client lets the errors of its HTTP library through; whichever it is, the user learns what failed.
        raise ModelError(f"{name} could not be fetched from the hub: {_first_line(error)}; try again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _choices() -> str:
    return f"a local directory, a built-in name ({', '.join(BUILTIN)}) or a hub id such as Qwen/Qwen3-0.6B"


def _listed(names: list[str]) -> str:
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "nothing"
