"""What a renderer is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tercet.chat.chat_template import ChatTemplate
from tercet.chat.encoding import Tokenizer
from tercet.chat.pieces import TRAIN_ON, Termination, TrainOn, did_you_mean
from tercet.chat.role_colon import RoleColon
from tercet.errors import ConfigError
from tercet.types import Conversation, Datum, Message

__all__ = ["RENDERERS", "TRAIN_ON", "Renderer", "Termination", "TrainOn", "renderer"]


class Renderer(Protocol):
    """Conversations to tokens and back.

    `datum(conversation)` begins with exactly the tokens of `generation_prompt` of the messages before its last answer.
    """

    name: str
    tokenizer: Tokenizer
    stop: tuple[str | int, ...]
    """What ends an answer: strings and token ids, for `SamplingParams.stop`."""
    opening: tuple[int, ...]
    """What the template itself puts before every answer, such as an empty block of thought. It is learned as part of
    the answer; who asks for a label puts it into the prompt."""

    def generation_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the conversation and the header of the assistant's answer.

        Raises:
            DataError: The conversation cannot be rendered.
        """
        ...

    def datum(
        self, conversation: Conversation, *, train_on: str = "all_assistant_messages", limit: int | None = None
    ) -> Datum:
        """The conversation with weight 1 on the content and the stop of what `train_on` chooses, 0 elsewhere.

        Raises:
            ConfigError: `train_on` is not in `TRAIN_ON`.
            DataError: Nothing is learned, there are more than `limit` tokens, or the conversation cannot be rendered.
        """
        ...

    def parse(self, tokens: Sequence[int]) -> tuple[Message, Termination]:
        """The answer in sampled tokens, without its stop, and how it ended."""
        ...


RENDERERS: dict[str, Callable[[Tokenizer], Renderer]] = {
    "chat_template": ChatTemplate,
    "role_colon": RoleColon,
}


def renderer(name: str, tokenizer: Tokenizer) -> Renderer:
    """The renderer of that name; `auto` is chat_template if the tokenizer has a template, else role_colon.

    Raises:
        ConfigError: The name is unknown.
        ModelError: The tokenizer does not fit the renderer.
    """
    if name == "auto":
        name = "chat_template" if tokenizer.chat_template else "role_colon"
    if name not in RENDERERS:
        raise ConfigError(f"renderer is {name!r}{did_you_mean(name, ('auto', *RENDERERS))}")
    return RENDERERS[name](tokenizer)
