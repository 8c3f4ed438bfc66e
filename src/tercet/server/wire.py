"""What comes and goes in protobuf: a batch to learn from, what it gave, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tercet.errors import UsageError
from tercet.server.messages import FLOAT32, INT32, INT64, MESSAGES
from tercet.types import Completion, TopLogprobs

DTYPES = {FLOAT32: "<f4", INT64: "<i8", INT32: "<i4"}
# What the SDK takes for "no entry" in a table of the likeliest tokens.
NO_TOKEN, NO_LOGPROB = 0, -99999.0


@dataclass(frozen=True)
class Row:
    """A datum as it was sent; place t of an input speaks of predicting `target_tokens[t]` from `tokens[: t + 1]`."""

    tokens: list[int]
    inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class LearnRequest:
    """A `forward_backward` as it was sent."""

    model_id: str
    seq_id: int
    loss: str
    forward_only: bool
    message: Any
    size: int
    """In bytes, as it came."""

    def tokens(self) -> int:
        """How many tokens it holds."""
        return sum(len(chunk.encoded_text.tokens) // 4 for datum in self.message.data for chunk in datum.model_input)

    def settings(self) -> dict[str, float]:
        """What the loss is to be told.

        Raises:
            UsageError: Something is text.
        """
        settings = dict(self.message.loss_fn_config)
        for name, value in self.message.loss_fn_config_v2.items():
            if value.HasField("text"):
                raise UsageError(f"the setting {name} of {self.loss} is text; the losses here take numbers")
            settings[name] = value.number
        return settings

    def rows(self) -> list[Row]:
        """Its data.

        Raises:
            UsageError: There is something in it that no engine here learns from.
        """
        return [_row(i, datum) for i, datum in enumerate(self.message.data)]


def read_learn_request(body: bytes) -> LearnRequest:
    """Read the head of a request to learn; its data are read when it is their turn.

    Raises:
        UsageError: It is no such request.
    """
    message = MESSAGES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(body)
    except Exception as error:  # protobuf's own error has another class in each of its implementations
        raise UsageError(f"the body is no ForwardBackwardRequest: {error}") from error
    return LearnRequest(message.model_id, message.seq_id, message.loss_fn, message.forward_only, message, len(body))


def _row(i: int, datum: Any) -> Row:
    tokens: list[int] = []
    for chunk in datum.model_input:
        if chunk.image or chunk.dmel:
            raise UsageError(f"datum {i} holds an image or sound; the models here read text")
        tokens += _numbers(f"model_input of datum {i}", chunk.encoded_text.tokens, "<i4").tolist()
    inputs = {name: _tensor(f"{name} of datum {i}", tensor) for name, tensor in datum.loss_fn_inputs.items()}
    for name, values in inputs.items():
        if len(values) != len(tokens):
            raise UsageError(
                f"{name} of datum {i} has {len(values)} entries for {len(tokens)} tokens; they must be as many"
            )
    return Row(tokens, inputs)


def _tensor(name: str, tensor: Any) -> np.ndarray:
    if tensor.sparse_csr or len(tensor.shape) > 1:
        raise UsageError(f"{name} has more than one dimension or is sparse; here it is one number per token")
    if tensor.dtype not in DTYPES:
        raise UsageError(f"{name} has the number type {tensor.dtype}; it must be float32, int64 or int32")
    return _numbers(name, tensor.dense, DTYPES[tensor.dtype])


def _numbers(name: str, content: bytes, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(content) % size:
        raise UsageError(f"{name} has {len(content)} bytes, which are no whole numbers of {size} each")
    return np.frombuffer(content, dtype)


def learn_response(logprobs: Sequence[Sequence[float]], metrics: Mapping[str, float]) -> bytes:
    """What a batch gave: for each datum the log-probs of its targets."""
    message = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord")
    message.metrics.update(metrics)
    record = message.loss_fn_outputs.add(num_datums=len(logprobs))
    tensor = record.fields["logprobs"]
    tensor.dtype = FLOAT32
    tensor.data = b"".join(np.asarray(row, "<f4").tobytes() for row in logprobs)
    tensor.offsets = np.cumsum([0, *(4 * len(row) for row in logprobs)], dtype="<i8").tobytes()
    return bytes(message.SerializeToString())


def sample_response(
    completions: Sequence[Completion],
    *,
    prompt_logprobs: Sequence[float] | None = None,
    top_of_prompt: Any = None,
    tops: Sequence[Any] = (),
) -> bytes:
    """Samples of one prompt.

    Args:
        completions: The samples.
        prompt_logprobs: Of every token of the prompt; NaN stands for none.
        top_of_prompt: The likeliest tokens at every place of the prompt, as `top_message` has them, or None.
        tops: The same at every place of each sample.
    """
    message = MESSAGES["SampleResponse"]()
    for i, completion in enumerate(completions):
        sequence = message.sequences.add(
            stop_reason=1 if completion.stop_reason == "length" else 0,
            tokens=np.asarray(completion.tokens, "<i4").tobytes(),
            logprobs=np.asarray(completion.logprobs, "<f4").tobytes(),
        )
        if tops and tops[i] is not None:
            sequence.topk_sampled_logprobs.CopyFrom(tops[i])
    if prompt_logprobs is not None:
        message.prompt_logprobs = np.asarray(prompt_logprobs, "<f4").tobytes()
    if top_of_prompt is not None:
        message.topk_prompt_logprobs.CopyFrom(top_of_prompt)
    return bytes(message.SerializeToString())


def top_message(top: TopLogprobs) -> Any:
    """The likeliest tokens at every place, a table whose missing entries are filled up."""
    message = MESSAGES["TopkLogprobs"](length=len(top))
    message.k = k = max((len(row) for row in top), default=0)
    padded = [[*row, *[(NO_TOKEN, NO_LOGPROB)] * (k - len(row))] for row in top]
    message.token_ids = np.asarray([[token for token, _ in row] for row in padded], "<i4").tobytes()
    message.logprobs = np.asarray([[logprob for _, logprob in row] for row in padded], "<f4").tobytes()
    return message
