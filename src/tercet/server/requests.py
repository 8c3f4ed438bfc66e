"""What clients send as JSON, with the names and defaults of tinker 0.38.0. Unknown fields are passed over."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tercet.errors import UsageError
from tercet.types import AdamParams, LoraConfig


def _can_be_told(metadata: Any) -> Any:
    """Metadata themselves, unless they hold what no answer can: half of a character, which JSON may spell."""
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text in it holds half of a character ({error.reason}); send whole ones") from error
    return metadata


Metadata = Annotated[dict[str, Any], BeforeValidator(_can_be_told)]
# Every trained weight takes 16 bytes with gradient and optimizer; ranks beyond the width of layers buy nothing.
MOST_RANK = 1024


class _Request(BaseModel):
    # Fields such as model_id are no trespass on pydantic's own names.
    model_config = ConfigDict(protected_namespaces=())


class ClientConfig(_Request):
    """`client/config` and `client/dynamic_config`."""

    sdk_version: str = ""


class CreateSession(_Request):
    """`create_session`."""

    sdk_version: str = ""
    user_metadata: Metadata | None = None
    display_name: str | None = None


class SessionHeartbeat(_Request):
    """`session_heartbeat`."""

    session_id: str


class FinishReason(_Request):
    """Why a session is over."""

    type: str = "success"


class FinishSession(_Request):
    """`sessions/{id}/finish`."""

    reason: FinishReason = Field(default_factory=FinishReason)
    detail: str | None = None


class Lora(_Request):
    """The adapter that is asked for."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def config(self) -> LoraConfig:
        """As engines know it; alpha is 32 whatever the rank, as on the hosted service.

        Raises:
            ConfigError: The rank is below 1.
            UsageError: It is too large, or nothing is to be trained.
        """
        if self.rank > MOST_RANK:
            raise UsageError(f"the LoRA rank is {self.rank}; here it is from 1 to {MOST_RANK} (16 to 64 is usual)")
        if not (self.train_mlp or self.train_attn):
            raise UsageError("neither train_attn nor train_mlp is set; adapters here sit on these layers")
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        both = self.train_mlp and self.train_attn
        return LoraConfig(
            rank=self.rank, alpha=32.0, targets=("all-linear",) if both else attention if self.train_attn else mlp
        )


class Optimizer(_Request):
    """The optimizer that is asked for."""

    type: str = "adamw"


class CreateModel(_Request):
    """`create_model`."""

    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: Optimizer = Field(default_factory=Optimizer)


class GetInfo(_Request):
    """`get_info`."""

    model_id: str


class LoadWeights(_Request):
    """`load_weights`: of a model that is there (`model_id`), or to make one (`session_id`)."""

    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    path: str
    optimizer: bool = False


class Adam(_Request):
    """One step of AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def params(self) -> AdamParams:
        """As engines know it; a norm of 0 does not clip.

        Raises:
            UsageError: A number is out of range, under which AdamW would not be AdamW or would climb.
        """
        for name, value, least, below in (
            ("learning_rate", self.learning_rate, 0.0, math.inf),
            ("beta1", self.beta1, 0.0, 1.0),
            ("beta2", self.beta2, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
        ):
            if not least <= value < below:
                wanted = "finite and not below 0" if below == math.inf else "from 0 to below 1"
                raise UsageError(f"{name} is {value}; it must be {wanted}")
        if not 0 < self.eps < math.inf:
            raise UsageError(f"eps is {self.eps}; it must be finite and above 0")
        # The norm itself may be infinite, which clips nothing; below 0 it would turn the gradient round.
        if not self.grad_clip_norm >= 0:
            raise UsageError(f"grad_clip_norm is {self.grad_clip_norm}; it must be above 0, or 0 not to clip")
        return AdamParams(
            learning_rate=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.grad_clip_norm or None,
        )


class OptimStep(_Request):
    """`optim_step`."""

    model_id: str
    seq_id: int
    adam_params: Adam | None = None


class SaveWeights(_Request):
    """`save_weights` and `save_weights_for_sampler`; without `path` the second keeps a sampler in memory."""

    model_id: str
    seq_id: int
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None
    sampling_session_seq_id: int | None = None


class CreateSamplingSession(_Request):
    """`create_sampling_session`."""

    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class Chunk(_Request):
    """A piece of a prompt."""

    type: str = "encoded_text"
    tokens: list[int] = Field(default_factory=list)


class Prompt(_Request):
    """What is to be gone on from."""

    chunks: list[Chunk]

    def tokens(self) -> tuple[int, ...]:
        """All of it.

        Raises:
            UsageError: A piece is no text.
        """
        for chunk in self.chunks:
            if chunk.type != "encoded_text":
                raise UsageError(f"the prompt holds a chunk of type {chunk.type!r}; the models here read text")
        return tuple(token for chunk in self.chunks for token in chunk.tokens)


class Sampling(_Request):
    """How to draw."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[int] | list[str] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(_Request):
    """`asample`."""

    num_samples: int = 1
    prompt: Prompt
    sampling_params: Sampling = Field(default_factory=Sampling)
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


class RetrieveFuture(_Request):
    """`retrieve_future` and `cancel_future`."""

    request_id: str


class WeightsInfo(_Request):
    """`weights_info`."""

    tinker_path: str


class TimeToLive(_Request):
    """`…/ttl`."""

    ttl_seconds: int | None = None
