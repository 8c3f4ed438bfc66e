"""The tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tercet.chat.encoding import Encoder, Tokenizer, text_of
from tercet.chat.pieces import Piece, Termination, learn, learned_messages, named
from tercet.chat.template_text import Span, TemplateText
from tercet.errors import DataError, ModelError
from tercet.types import Conversation, Datum, Message


class ChatTemplate:
    """Renders with the tokenizer's chat template: as text first, then tokenised piece by piece.

    The text is cut where an answer begins and where its stop ends, in a prompt as in a training example, so that a
    training example begins with exactly the tokens the model is later prompted with. The template writes BOS or does
    not; nothing is added to it.
    """

    name: str = "chat_template"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read from the template how it ends an answer.

        Raises:
            ModelError: The tokenizer has no chat template, or one that cannot be trained on.
        """
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template; use the role_colon renderer, or give it a template")
        self.tokenizer = tokenizer
        self._encode = Encoder(tokenizer)
        self._template = TemplateText(tokenizer)
        answer = self._template.answer
        turn_end: str | int = answer.stop if answer.stop_id is None else answer.stop_id
        eos = tokenizer.eos_token_id
        self.stop: tuple[str | int, ...] = (turn_end,) if eos in (None, turn_end) else (turn_end, eos)
        # White space alone is better left to the label's own token: many vocabularies hold " A".
        self.opening: tuple[int, ...] = self._encode(answer.before) if answer.before.strip() else ()

    def generation_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the conversation and the header of the assistant's answer.

        Raises:
            DataError: The template refuses the conversation.
        """
        return [token for piece in self._pieces(conversation, generate=True) for token in piece.tokens]

    def datum(
        self, conversation: Conversation, *, train_on: str = "all_assistant_messages", limit: int | None = None
    ) -> Datum:
        """The conversation with weight 1 on what is learned.

        Raises:
            ConfigError: `train_on` is unknown.
            DataError: Nothing is learned, there are more than `limit` tokens, or the template does not write a learned
                message as it would have been sampled.
        """
        # Learning every token asks nothing of where the messages stand.
        learned = learned_messages(conversation, train_on) if train_on != "all_tokens" else frozenset()
        pieces = self._pieces(conversation, learned=learned)
        return learn(pieces, conversation, train_on=train_on, limit=limit)

    def parse(self, tokens: Sequence[int]) -> tuple[Message, Termination]:
        """The answer in sampled tokens, and how it ended: `stop`, or `malformed` when no stop ends it."""
        answer = self._template.answer
        ids = {stop for stop in self.stop if isinstance(stop, int)}
        end = next((i for i, token in enumerate(tokens) if token in ids), len(tokens))
        ended: Termination = "stop" if end == len(tokens) - 1 else "malformed"
        text = text_of(self.tokenizer, tokens[:end], special=False)
        for stop in self.stop:
            if isinstance(stop, str) and stop in text:
                text, ended = text[: text.index(stop)], "stop"
        # White space, or an empty block of thought, that the template itself writes before every answer.
        return Message("assistant", text.removeprefix(answer.before)), ended

    def _pieces(
        self, conversation: Conversation, *, generate: bool = False, learned: frozenset[int] = frozenset()
    ) -> list[Piece]:
        text = self._template.text(conversation, generate=generate)
        spans = self._template.answers(conversation, generate=generate)
        if any(conversation[i].role != "assistant" for i in learned):
            spans = [*spans, *self._template.others(conversation)]
        _check_found(conversation, learned, spans)
        edges = sorted({0, len(text), *(edge for span in spans for edge in (span.head, span.start, span.end))})
        pieces = []
        for start, end in pairwise(edges):
            message = next((span.message for span in spans if span.start <= start and end <= span.end), None)
            pieces.append(Piece(self._encode(text[start:end], first=start == 0), message))
        return pieces


def _check_found(conversation: Conversation, learned: frozenset[int], spans: Sequence[Span]) -> None:
    missing = sorted(learned - {span.message for span in spans})
    if not missing:
        return
    i = missing[0]
    why = (
        "nothing comes before it that would prompt it"
        if i == 0 and conversation[0].role == "assistant"
        else "once other messages are around it the chat template writes it otherwise than it would be sampled"
    )
    raise DataError(
        f"{named(conversation)}: message {i} ({conversation[i].role}) cannot be learned: {why}. "
        "Train on last_assistant_message, or use a template whose generation marks surround every answer"
    )
