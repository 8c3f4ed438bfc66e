"""The published RLHF recipe of tinker-cookbook, as installed from the registry, on a model of this machine.

python examples/cookbook/run.py                                     # SmolLM2-135M: minutes a stage on two cores
python examples/cookbook/run.py --model tiny -- max_steps=2 batch_size=4 rl_max_tokens=8 eval_every=1

It makes a folder with what the recipe looks for by name (a tokenizer and two data sets, here tercet's built-in corpus
in their layout), starts `tercet serve` under the name of a model the recipe knows, and runs the recipe there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tercet.data.sources import CORPUS
from tercet.models.names import resolve
from tercet.models.tiny import tiny_model

# The cookbook has a closed table of models; this is one of a base model, so that conversations are plain text.
NAME = "Qwen/Qwen3.5-9B-Base"
# Its chat models; the recipe `shorter` asks for this one.
CHAT_NAME = "Qwen/Qwen3.5-4B"
RECIPE = "tinker_cookbook.recipes.preference.rlhf.rlhf_pipeline"
# Of a size for two cores; a word after -- replaces one of them.
SETTINGS = [
    "max_length=512", "batch_size=32", "max_steps=12", "lora_rank=16", "sft_learning_rate=5e-4",
    "rm_learning_rate=5e-4", "rl_learning_rate=5e-5", "rl_max_tokens=32", "eval_every=6", "save_every=6",
]  # fmt: skip
COOKBOOK = ("tinker-cookbook==0.6.1",)
# tinker-cookbook 0.6.1 asks for a tml-renderers that the registry does not have; text models need none of it. What this
# interpreter has already is used from there.
BESIDE = [
    "tinker==0.38.0", "tml-renderers==0.2.1", "aiohttp", "blobfile", "chz", "cloudpickle", "pillow", "pyrage",
    "termcolor", "tiktoken",
]  # fmt: skip


def cookbook_python(place: Path) -> str:
    """The interpreter of an environment with the cookbook in it, made the first time.

    It sees the packages of the environment that runs this, so that only what those lack is fetched.
    """
    python = place / "bin/python"
    if not (place / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        [inside] = place.glob("lib/python*/site-packages")
        (inside / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        constraints = Path(__file__).parents[2] / "constraints.txt"
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
        subprocess.run([*pip, *BESIDE], check=True)
        subprocess.run([*pip, "--no-deps", *COOKBOOK], check=True)
        (place / "complete").touch()
    return str(python)


def prepare(folder: Path, model: str, test_rows: int, copies: int) -> None:
    """What the recipe finds by name in the folder it runs in, before it asks the hub."""
    for name in (NAME, CHAT_NAME):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
            if (resolve(model) / file).exists():
                shutil.copy(resolve(model) / file, place / file)
    write(folder / "HuggingFaceH4/no_robots", [conversation(row) for row in rows("conversations")], test_rows)
    write(folder / "Anthropic/hh-rlhf", [comparison(row) for row in rows("comparisons")], test_rows, copies)


def rows(name: str) -> list[dict[str, Any]]:
    """A file of the built-in corpus."""
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text().splitlines()]


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """As no_robots has it."""
    first = row["messages"][0]["content"]
    return {
        "split": row["split"],
        "prompt": first,
        "prompt_id": first,
        "messages": row["messages"],
        "category": row["kind"],
    }


def comparison(row: dict[str, Any]) -> dict[str, Any]:
    """As hh-rlhf has it."""
    both = {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
    return {"split": row["split"], **both}


def write(folder: Path, found: list[dict[str, Any]], test_rows: int, copies: int = 1) -> None:
    """A data set in files by split; training rows stand there so many times."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps({k: v for k, v in row.items() if k != "split"}) for row in found if row["split"] == split]
        lines = lines[:test_rows] if split == "test" else lines * copies
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@contextmanager
def server(folder: Path, model: str, words: list[str]) -> Iterator[dict[str, str]]:
    """A server of the model; gives the two variables that lead a client to it."""
    command = [
        sys.executable, "-m", "tercet.cli.main", "serve", "--model", model, "--port", "0", "--out", "checkpoints",
        "--alias", f"{NAME}={model}", f"{CHAT_NAME}={model}", *words,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("serving:"):
                yield dict(re.findall(r"(TINKER_\w+)=(\S+)", line))
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> int:
    """Prepare, serve, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the base model that is served")
    parser.add_argument("--folder", type=Path, default=Path("runs/cookbook"), help="where it all happens")
    parser.add_argument("--python", help="an interpreter that has tinker-cookbook 0.6.1; one is made without")
    parser.add_argument("--install", type=Path, help="only make that environment, here; says where its interpreter is")
    parser.add_argument("--test-rows", type=int, default=32, help="held-out rows; the recipe has no setting for them")
    parser.add_argument("--copies", type=int, default=1,
                        help="times the comparisons stand in their file; the recipe reads it once")  # fmt: skip
    parser.add_argument("--recipe", default=RECIPE, help="the module of another recipe")
    parser.add_argument("--serve", default="", help="words for tercet serve")
    parser.add_argument("settings", nargs="*", help="key=value for the recipe, after --")
    asked = parser.parse_args()
    if asked.install is not None:
        print(cookbook_python(asked.install.resolve()))
        return 0
    folder: Path = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # The recipe's evaluation answers with up to 1,024 tokens, and its judge reads two answers.
    model = str(tiny_model(folder / "tiny", context=4096)) if asked.model == "tiny" else asked.model
    prepare(folder, model, asked.test_rows, asked.copies)
    python = asked.python or cookbook_python(folder / ".venv-cookbook")
    given = [word for word in SETTINGS if asked.recipe == RECIPE] + asked.settings
    settings = list({word.partition("=")[0]: word for word in given}.values())
    with server(folder, model, asked.serve.split()) as variables:
        environment = {
            **os.environ, **variables, "HF_HUB_OFFLINE": "1", "TINKER_COOKBOOK_RUNS_DIR": str(folder / "runs"),
        }  # fmt: skip
        print(f"running: python -m {asked.recipe} {' '.join(settings)}", flush=True)
        return subprocess.run([python, "-m", asked.recipe, *settings], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
