"""What every command needs: a base model in an engine, a renderer, and rows turned into what the loops learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tercet import data
from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import Renderer, renderer
from tercet.config import to_mapping
from tercet.data import Loaded
from tercet.engine.base import Sampler
from tercet.errors import ConfigError, DataError, UsageError
from tercet.rewards.judge import Judge
from tercet.types import Comparison, Conversation, Datum, LoraConfig, Weights

if TYPE_CHECKING:
    from tercet.engine.local import LocalEngine

Row = TypeVar("Row")
Say = Callable[[str], None]
# What may change between two starts of one run: it moves no number that is learned from.
FREE = frozenset({"setup.log_with", "setup.threads"})


@dataclass(frozen=True, kw_only=True)
class SetupConfig:
    """The model and the machine."""

    model: str = "smollm2-135m"
    """The base model: smollm2-135m, tiny, a local directory, or a hub id."""
    renderer: str = "auto"
    """How conversations become tokens: chat_template, role_colon, or auto (the template when there is one)."""
    method: Literal["lora", "full"] = "lora"
    """lora trains adapters that share one base; full trains a copy of the whole model in every stage."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Size and place of the adapters."""
    seed: int = 0
    """Of the order of rows, of every sample, and of new adapters."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; auto is bfloat16 on CUDA and float32 on the CPU. What is trained is float32."""
    threads: int | None = None
    """CPU threads; null takes one for every core this process may use."""
    micro_batch_tokens: int = 2048
    """Tokens, after merging prefixes, of one pass with gradient; lower it when memory is short."""
    max_rows: int = 128
    """Answers decoded side by side; lower it when memory is short."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used and count them, instead of stopping at the first."""
    trust_remote_code: bool = False
    """Let Python files that came with a model run."""
    log_with: tuple[str, ...] = ()
    """Trackers beside TensorBoard: wandb, trackio."""

    @property
    def adapter(self) -> LoraConfig | None:
        """What a trainer is given."""
        return self.lora if self.method == "lora" else None


@dataclass(frozen=True)
class Session:
    """A base model in memory and the way conversations are written for it."""

    setup: SetupConfig
    engine: LocalEngine
    renderer: Renderer
    say: Say

    def judge(self, sampler: Sampler, *, limit: int, verdict: Literal["soft", "hard"] = "soft") -> Judge:
        """A preference model as a judge; comparisons longer than `limit` lose the beginning of their conversation."""
        return Judge(sampler, self.comparisons(limit), verdict=verdict)

    def comparisons(self, limit: int) -> ComparisonRenderer:
        """How comparisons are shown, within what the model takes."""
        return ComparisonRenderer(self.renderer, min(limit, self.engine.context_tokens))

    def config_of(self, stage: str, config: object, **origin: str) -> dict[str, Any]:
        """What a stage's folder keeps: model and machine, the stage's own settings, and which weights it began with."""
        mapping: dict[str, Any] = {"setup": to_mapping(self.setup), stage: to_mapping(config)}
        return {**mapping, "origin": origin} if origin else mapping

    def fingerprint(self, weights: Weights) -> str:
        """A short hash of saved weights."""
        return self.engine.sampler(weights).fingerprint()[:16]


def open_session(setup: SetupConfig, say: Say) -> Session:
    """Load the base model and make an engine of it."""
    import torch

    from tercet.engine.local import LocalEngine
    from tercet.models.load import load_model
    from tercet.runs.environment import environment

    torch.set_num_threads(setup.threads or max(1, int(environment()["cpus"])))
    device = setup.device if setup.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = setup.dtype if setup.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    loaded = load_model(setup.model, dtype=dtype, device=device, trust_remote_code=setup.trust_remote_code)
    engine = LocalEngine(loaded, micro_batch_tokens=setup.micro_batch_tokens, max_rows=setup.max_rows)
    chosen = renderer(setup.renderer, loaded.tokenizer)
    say(f"model {setup.model} on {device} ({dtype}, {torch.get_num_threads()} threads), renderer {chosen.name}")
    return Session(setup, engine, chosen, say)


def train_and_test(
    load: Callable[..., Loaded[Row]], setup: SetupConfig, source: str, test_source: str | None, test_rows: int, say: Say
) -> tuple[list[Row], list[Row]]:
    """Rows to learn and rows held out: from `test_source`, else the source's test split, else set aside by the seed."""
    train = load(source, skip_bad_rows=setup.skip_bad_rows)
    say(train.describe())
    purpose: Literal["comparisons", "conversations"] = (
        "comparisons" if load is data.load_comparisons else "conversations"
    )
    if test_source is not None or "test" in data.splits(source, purpose=purpose):
        split = "test" if "test" in data.splits(test_source or source, purpose=purpose) else "train"
        test = load(test_source or source, split=split, skip_bad_rows=setup.skip_bad_rows)
        say(test.describe())
        if len(test.rows) > test_rows:
            test_kept = data.order(len(test.rows), seed=setup.seed, epoch=0)[:test_rows]
            return train.rows, [test.rows[i] for i in sorted(test_kept)]
        return train.rows, test.rows
    count = min(test_rows, max(1, len(train.rows) // 10))
    kept, held = data.hold_out(train.rows, count=count, seed=setup.seed)
    say(f"{len(held)} of {len(train.rows)} rows of {source} are held out for tests")
    return kept, held


def conversation_data(session: Session, rows: Sequence[Conversation], *, train_on: str, max_length: int) -> list[Datum]:
    """Conversations as tokens and weights; those over the limit are left out and counted aloud.

    Raises:
        DataError: None is left, or a conversation has nothing to learn.
    """
    limit = min(max_length, session.engine.context_tokens)
    data_ = [session.renderer.datum(row, train_on=train_on) for row in rows]
    kept = [datum for datum in data_ if len(datum.tokens) <= limit]
    if len(kept) < len(data_):
        session.say(
            f"{len(data_) - len(kept)} of {len(data_)} conversations have more than {limit} tokens and are left out"
        )
    if not kept:
        raise DataError(f"every conversation has more than {limit} tokens; raise max_length")
    return kept


def usable_comparisons(session: Session, rows: Sequence[Comparison], limit: int, what: str) -> list[Comparison]:
    """Comparisons that fit, counted aloud when some do not: their answers alone exceed the limit."""
    shown = session.comparisons(limit)
    kept = []
    for row in rows:
        try:
            shown.prompt(row)
        except DataError:
            continue
        kept.append(row)
    if len(kept) < len(rows):
        session.say(
            f"{len(rows) - len(kept)} of {len(rows)} comparisons {what} have answers too long for {limit} tokens and are left out"
        )
    if not kept:
        raise DataError(f"no comparison {what} fits into {limit} tokens; raise preference.max_length")
    return kept


def usable_prompts(
    session: Session, rows: Sequence[Conversation], *, max_prompt_length: int, max_tokens: int
) -> list[Conversation]:
    """Prompts that fit beside an answer, the others counted aloud."""
    limit = min(max_prompt_length, session.engine.context_tokens - max_tokens)
    kept = [row for row in rows if len(session.renderer.generation_prompt(row)) <= limit]
    if len(kept) < len(rows):
        session.say(f"{len(rows) - len(kept)} of {len(rows)} prompts have more than {limit} tokens and are left out")
    if not kept:
        raise DataError(f"every prompt has more than {limit} tokens; raise max_prompt_length")
    return kept


def saved_weights(path: str, what: str) -> Weights:
    """The weights in a run's folder or a weights directory named on the command line."""
    from pathlib import Path

    from tercet.models.export import find_weights

    if not Path(path).is_dir():
        raise UsageError(f"{what} is {path!r}, which is not a directory; name a run's folder or an adapter's directory")
    return Weights(find_weights(Path(path)))


def check_positive(settings: Mapping[str, int]) -> None:
    """Refuse settings below 1, by name."""
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
