"""What every command needs: a base model in an engine, and the way conversations are written for it."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tercet.chat.answers import AnswerRenderer
from tercet.chat.comparisons import ComparisonRenderer
from tercet.chat.renderers import Renderer, renderer
from tercet.config import to_mapping
from tercet.engine.base import Sampler, Scorer
from tercet.errors import ConfigError, ModelError
from tercet.models.memory import BYTES, PASS_TOKENS, estimate, pass_tokens, read_shape
from tercet.rewards.judge import Judge
from tercet.rewards.scalar import ScalarJudge
from tercet.types import Comparison, Conversation, LoraConfig, Message, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tercet.engine.local import LocalEngine
    from tercet.engine.remote import RemoteEngine
    from tercet.models.load import LoadedModel

Say = Callable[[str], None]
# What may change between two starts of one run: it moves no number that is learned from, but for the last bits, which
# may hang on the number of threads. Of policy and judge the weights themselves are compared, wherever they lie.
FREE = frozenset({"log_with", "threads", "out", "policy", "judge_model"})

# Of texts with the most characters so many are looked at for the most tokens.
COUNTED_TEXTS = 16


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """The machine, and what it may do."""

    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; auto is bfloat16 on CUDA and, for models from 50 million weights on, on a CPU that multiplies
    it (AVX512-BF16, AMX); else float32. What is trained is float32."""
    threads: int | None = None
    """CPU threads; null takes OMP_NUM_THREADS where it is set, else one for every physical core that may be used."""
    max_rows: int = 128
    """Answers decoded side by side; lower it when memory is short."""
    trust_remote_code: bool = False
    """Let Python files that came with a model run."""
    seed: int = 0
    """Of the order of rows, of every sample, and of new adapters."""


@dataclass(frozen=True, kw_only=True)
class SetupConfig(MachineConfig):
    """The model and the machine."""

    model: str = "smollm2-135m"
    """The base model: smollm2-135m, tiny, a local directory, or a hub id."""
    engine: Literal["local", "tinker"] = "local"
    """Where weights are: local (this machine), or tinker, a service that TINKER_BASE_URL and TINKER_API_KEY lead to."""
    sampler: Literal["local", "vllm"] = "local"
    """What draws answers: local, or vllm, which takes over the policy's weights at each step (docs/engine.md)."""
    renderer: str = "auto"
    """How conversations become tokens: chat_template, role_colon, or auto (the template when there is one)."""
    method: Literal["lora", "full"] = "lora"
    """lora trains adapters that share one base; full trains a copy of the whole model in every stage."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Size and place of the adapters."""
    micro_batch_tokens: int | None = None
    """Tokens, after merging prefixes, of one pass with gradient; lower it when memory is short. Null is 1,024 on a CPU
    and on CUDA from there to 16,384: what takes a quarter of the GPU's memory."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used and count them, instead of stopping at the first."""
    log_with: tuple[str, ...] = ()
    """Trackers beside TensorBoard: wandb, trackio."""

    @property
    def adapter(self) -> LoraConfig | None:
        """What a trainer is given."""
        return self.lora if self.method == "lora" else None


@dataclass(frozen=True)
class Session:
    """A base model, in memory or at a service, and the way conversations are written for it."""

    setup: SetupConfig
    engine: LocalEngine | RemoteEngine
    tokenizer: Tokenizer
    renderer: Renderer
    say: Say

    def judge(self, sampler: Sampler, *, limit: int, verdict: Literal["soft", "hard"] = "soft") -> Judge:
        """A preference model as a judge; comparisons longer than `limit` lose the beginning of their conversation."""
        return Judge(sampler, self.comparisons(limit), verdict=verdict)

    def comparisons(self, limit: int) -> ComparisonRenderer:
        """How comparisons are shown, within what the model takes."""
        return ComparisonRenderer(self.renderer, min(limit, self.engine.context_tokens))

    def answers(self, limit: int) -> AnswerRenderer:
        """How an answer is shown by itself, within what the model takes."""
        return AnswerRenderer(self.renderer, min(limit, self.engine.context_tokens))

    def scalar_judge(self, scorer: Scorer, *, limit: int) -> ScalarJudge:
        """A reward model as a judge; conversations longer than `limit` lose their beginning."""
        return ScalarJudge(scorer, self.answers(limit))

    def check_room(self, *, limit: int, answer_tokens: int) -> None:
        """Refuse answers so long that a judge could not be shown two of them; better now than after hours.

        Raises:
            ConfigError: They do not fit.
        """
        shown = self.comparisons(limit)
        short = (Message("assistant", "."),)
        frame = len(shown.prompt(Comparison((Message("user", "Hi"),), short, short)))
        needed = frame + 2 * answer_tokens
        if needed > shown.limit:
            raise ConfigError(
                f"two answers of {answer_tokens} tokens and what stands around them take {needed} tokens, and the "
                f"judge reads {shown.limit}; lower max_tokens, or train the preference model with a larger max_length"
            )

    def config_of(self, kind: type, config: object, **more: object) -> dict[str, Any]:
        """What a stage's folder keeps, as its verb would read it: model, machine, and the settings of class `kind`."""
        return {**settings_of(SetupConfig, self.setup), **settings_of(kind, config), **to_mapping(more)}

    def fingerprint(self, weights: Weights | None) -> str:
        """A short hash of saved weights; of the base, a word."""
        return "base" if weights is None else self.engine.sampler(weights).fingerprint()[:16]

    def longest(self, texts: Iterable[Conversation], limit: int) -> int:
        """About how many tokens the longest of some conversations has, at most `limit`: the most of those few that have
        the most characters."""
        written = ("\n\n".join(message.content for message in text) for text in texts)
        longest = heapq.nlargest(COUNTED_TEXTS, written, key=len)
        tokens = (len(self.tokenizer.encode(text, add_special_tokens=False)) for text in longest)
        return min(limit, max(tokens, default=0))

    def memory(
        self,
        *,
        sampled_rows: int = 0,
        row_tokens: int = 0,
        longest_tokens: int | None = None,
        tied: int = 1,
        trainers: int = 1,
        others: int = 0,
    ) -> str:
        """What training will need, in words.

        Args:
            sampled_rows: Rows that are sampled, and then learned.
            row_tokens: Prompt and answer of such a row.
            longest_tokens: Of a sequence that is learned; None when it is a row that was sampled.
            tied: Such sequences that are computed together: 2 of a pair.
            trainers: What learns: 2 with a critic of its own.
            others: Read from saves, and only asked: reference, judges.
        """
        from tercet.engine.local import LocalEngine
        from tercet.engine.vllm_sampler import VllmEngine

        setup = self.setup
        if not isinstance(self.engine, LocalEngine):
            return "the weights stay at the service"
        model = self.engine.loaded.model
        try:
            shape = read_shape(self.engine.loaded.path)
        except ModelError as error:
            return f"how much memory it takes is not known: {error}"
        found = estimate(
            shape,
            lora_rank=setup.lora.rank if setup.method == "lora" else None,
            dtype=str(model.dtype).removeprefix("torch."),
            on_cpu=model.device.type == "cpu",
            micro_batch_tokens=self.engine.budgets.micro_batch_tokens,
            sampled_rows=min(setup.max_rows, sampled_rows),
            row_tokens=row_tokens,
            longest_tokens=min(row_tokens if longest_tokens is None else longest_tokens, self.engine.context_tokens),
            tied=tied,
            adapters=trainers,
            references=others,
            vllm_bytes=self.engine.vllm_bytes if isinstance(self.engine, VllmEngine) and sampled_rows else 0,
        )
        size = f"{found.total / 1e9:.1f} GB" if found.total >= 1e8 else f"{found.total / 1e6:.0f} MB"
        return f"about {size} beside Python"


def settings_of(kind: type, config: object) -> dict[str, Any]:
    """The settings that class `kind` declares, of a config of that class or of one that extends it, as plain data."""
    return {each.name: to_mapping(getattr(config, each.name)) for each in fields(kind)}


def open_session(setup: SetupConfig, say: Say) -> Session:
    """Load the base model and make an engine of it, or begin a session with the service that has it."""
    if setup.engine == "tinker":
        return _open_service(setup, say)
    import torch

    engine = local_engine(setup)
    loaded = engine.loaded
    # What auto came to is kept with the run, which then goes on with it or is refused, on whatever machine.
    setup = replace(
        setup,
        dtype="bfloat16" if loaded.model.dtype == torch.bfloat16 else "float32",
        micro_batch_tokens=engine.budgets.micro_batch_tokens,
    )
    chosen = renderer(setup.renderer, loaded.tokenizer)
    millions = sum(each.numel() for each in loaded.model.parameters()) / 1e6
    threads = torch.get_num_threads()
    say(
        f"model: {setup.model}, {millions:,.3g} million weights, on {loaded.model.device.type} ({setup.dtype}, "
        f"{threads} thread{'s' if threads > 1 else ''}), renderer {chosen.name}"
        f"{', answers drawn by vLLM' if setup.sampler == 'vllm' else ''}"
    )
    return Session(setup, engine, loaded.tokenizer, chosen, say)


def local_engine(setup: SetupConfig) -> LocalEngine:
    """The base model in this machine's memory."""
    import torch

    from tercet.engine.local import LocalEngine
    from tercet.engine.vllm_sampler import VllmEngine, require_vllm
    from tercet.models.load import load_model
    from tercet.runs.environment import default_threads, environment

    if setup.sampler == "vllm":
        require_vllm()
    asked = {"micro_batch_tokens": setup.micro_batch_tokens, "max_rows": setup.max_rows, "threads": setup.threads}
    check_positive({name: value for name, value in asked.items() if value is not None})
    torch.set_num_threads(setup.threads or default_threads(environment()))
    device = device_of(setup)
    loaded = load_model(setup.model, dtype=setup.dtype, device=device, trust_remote_code=setup.trust_remote_code)
    kind = VllmEngine if setup.sampler == "vllm" else LocalEngine
    return kind(loaded, micro_batch_tokens=micro_batch_tokens(setup, loaded), max_rows=setup.max_rows)


def micro_batch_tokens(setup: SetupConfig, loaded: LoadedModel) -> int:
    """How many tokens pass at once with gradient: as many as are asked for, or what suits the machine."""
    import torch

    if setup.micro_batch_tokens is not None:
        return setup.micro_batch_tokens
    device, dtype = loaded.model.device, str(loaded.model.dtype).removeprefix("torch.")
    gpu = int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
    try:
        sizes = read_shape(loaded.path)
    except ModelError:
        return PASS_TOKENS
    rank = None if setup.adapter is None else setup.lora.rank
    return pass_tokens(sizes, gpu, lora_rank=rank, dtype=dtype if dtype in BYTES else "float32")


def decided_here(setup: SetupConfig) -> set[str]:
    """What may differ from when a run of several stages began: they keep what it came to on their machine, each."""
    return {"dtype"} if setup.micro_batch_tokens else {"dtype", "micro_batch_tokens"}


def device_of(setup: MachineConfig) -> str:
    """Where this machine computes."""
    import torch

    return setup.device if setup.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _open_service(setup: SetupConfig, say: Say) -> Session:
    from tercet.engine.bodies import Language
    from tercet.engine.remote import ALPHA, RemoteEngine
    from tercet.models.load import load_context_tokens, load_tokenizer

    if setup.sampler != "local":
        raise ConfigError(f"sampler is {setup.sampler}, and engine tinker draws answers at the service; leave it local")
    if setup.method != "lora" or setup.lora.alpha != ALPHA or setup.lora.targets != LoraConfig().targets:
        raise ConfigError(
            f"engine tinker trains adapters of lora.alpha {ALPHA:g} on lora.targets {LoraConfig().targets}; got method "
            f"{setup.method}, {setup.lora.alpha:g} and {setup.lora.targets}; set these, or engine local"
        )
    # It is the service's business; a folder keeps a number all the same, as it does of what computes here.
    setup = replace(setup, micro_batch_tokens=setup.micro_batch_tokens or PASS_TOKENS)
    tokenizer = load_tokenizer(setup.model, trust_remote_code=setup.trust_remote_code)
    chosen = renderer(setup.renderer, tokenizer)
    engine = RemoteEngine.connect(
        setup.model,
        Language(frozenset({tokenizer.eos_token_id}), lambda tokens: str(tokenizer.decode(tokens))),
        context_tokens=load_context_tokens(setup.model, trust_remote_code=setup.trust_remote_code),
    )
    say(f"model: {setup.model}, at {os.environ.get('TINKER_BASE_URL', 'the hosted service')}, renderer {chosen.name}")
    return Session(setup, engine, tokenizer, chosen, say)


def check_positive(settings: Mapping[str, int]) -> None:
    """Refuse settings below 1, by name.

    Raises:
        ConfigError: Names the first of them.
    """
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
