"""A chat template as a function from conversations to text, and where in that text each answer stands."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from tercet.chat.encoding import Tokenizer
from tercet.chat.pieces import named
from tercet.errors import DataError, ModelError
from tercet.types import Conversation, Message, as_messages

CACHED_TEXTS = 512

# No conversation holds these by accident: private-use characters around a word.
_PROBE = "\ue000probe\ue001"
_OPEN, _CLOSE = "\ue000generation\ue001", "\ue000endgeneration\ue001"
_MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Span:
    """Characters `start:end` of a text are the content and the stop of message number `message`.

    A prompt for this message ends at `head`: at `start`, or before it where the template itself begins the answer.
    """

    head: int
    start: int
    end: int
    message: int


@dataclass(frozen=True)
class Turn:
    """How a template writes a message: text before the content, stop after it, white space after the stop."""

    before: str
    stop: str
    after: str
    stop_id: int | None
    """The stop as a token, where it is one."""


class TemplateText:
    """Renders with a tokenizer's chat template, as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the template, and by a trial how it writes an answer.

        Raises:
            ModelError: It cannot be found out by what an answer ends, or the prompt for an answer is not how it begins.
        """
        self.tokenizer = tokenizer
        self._added = [(str(token), i) for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()]
        template = tokenizer.get_chat_template()
        # An `if` block instead of the `generation` block: the same white-space rules, and the text says where it is.
        self._marked_template, marks = _MARKER.subn(_as_text, template)
        self.has_generation_marks = marks > 0
        # Comparisons of one prompt begin alike; their common beginnings are rendered once.
        self._cached = lru_cache(maxsize=CACHED_TEXTS)(self._render)
        self.answer = self._answer()

    def text(self, conversation: Conversation, *, generate: bool = False) -> str:
        """The conversation as the template writes it; with `generate`, followed by the header of an answer.

        Raises:
            DataError: The template refuses the conversation.
        """
        return self._spans_removed(self._cached(conversation, generate, self.has_generation_marks))[0]

    def answers(self, conversation: Conversation, *, generate: bool = False) -> list[Span]:
        """Where the assistant's messages stand in `text(conversation, generate=generate)`.

        By the template's `{% generation %}` marks if it has them. Else by construction: a message stands between the
        rendering that ends before it, with the header of an answer, and the rendering that ends with it. Messages that
        the template writes otherwise once more messages follow cannot be found by construction and are left out. Where
        there are fewer marks than messages, they belong to the last ones.

        Raises:
            ModelError: There are more marks than assistant messages.
        """
        indices = [i for i, message in enumerate(conversation) if message.role == "assistant"]
        text = self.text(conversation, generate=generate)
        if self.has_generation_marks:
            return self._marked(conversation, indices, text, generate=generate)
        spans = []
        for i in indices if conversation[0].role != "assistant" else indices[1:]:
            head, whole = self.text(conversation[:i], generate=True), self.text(conversation[: i + 1])
            ending = self.answer.stop + self.answer.after
            if text.startswith(whole) and whole.startswith(head) and whole[len(head) :].endswith(ending):
                spans.append(Span(len(head), len(head), len(whole) - len(self.answer.after), i))
        return spans

    def others(self, conversation: Conversation) -> list[Span]:
        """Where the messages of everybody but the assistant stand in `text(conversation)`.

        Messages that the template does not write one after the other (a system message inside a user's) are left out.
        """
        spans = []
        text = self.text(conversation)
        for i, message in enumerate(conversation):
            if message.role == "assistant":
                continue
            try:
                start = len(self.text(conversation[:i])) if i else 0
                whole = self.text(conversation[: i + 1])
                probe = self.text((*conversation[:i], replace(message, content=_PROBE)))
            except DataError:
                continue
            turn = self._turn(probe[start:])
            if turn is None:
                continue
            before, ending = probe[:start] + turn.before, turn.stop + turn.after
            if text.startswith(whole) and whole.startswith(before) and whole.endswith(ending):
                spans.append(Span(len(before), len(before), len(whole) - len(turn.after), i))
        return spans

    def _render(self, conversation: Conversation, generate: bool, marked: bool) -> str:
        from jinja2 import TemplateError

        if not conversation:
            raise DataError(
                "an empty conversation cannot be rendered with a chat template; it needs at least one message"
            )
        try:
            # tokenize=False: as tokens the return type differs between transformers 4 and 5.
            return str(
                self.tokenizer.apply_chat_template(
                    as_messages(conversation),
                    tokenize=False,
                    add_generation_prompt=generate,
                    **({"chat_template": self._marked_template} if marked else {}),
                )
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in conversation)
            raise DataError(
                f"{named(conversation)}: the chat template refuses it ({error}); its messages are {roles}. "
                "Drop it, or use the role_colon renderer"
            ) from error

    def _answer(self) -> Turn:
        question = Message("user", "Hi")
        try:
            head = self.text((question,), generate=True)
            whole = self.text((question, Message("assistant", _PROBE)))
        except DataError as error:
            raise ModelError(f"the chat template cannot write a question and an answer: {error}") from error
        if not whole.startswith(head):
            raise ModelError(
                f"the chat template asks for an answer with {head!r} but writes an answered conversation as {whole!r}: "
                "a model cannot learn what it will be asked. Use the role_colon renderer or another template"
            )
        turn = self._turn(whole[len(head) :])
        if turn is None or not turn.stop.strip():
            raise ModelError(
                f"the chat template writes nothing by which an answer could be seen to end: {whole!r}. "
                "Use the role_colon renderer or another template"
            )
        return turn

    def _turn(self, text: str) -> Turn | None:
        before, probe, ending = text.partition(_PROBE)
        if not probe:
            return None
        # The first special token after the content ends it; a template without one must end it by words.
        found = [(ending.index(token), token, token_id) for token, token_id in self._added if token in ending]
        if not found:
            stop = ending.rstrip()
            return Turn(before, stop, ending[len(stop) :], None)
        at, token, token_id = min(found, key=lambda entry: (entry[0], -len(entry[1])))
        cut = at + len(token)
        return Turn(before, ending[:cut], ending[cut:], token_id)

    def _marked(self, conversation: Conversation, indices: list[int], text: str, *, generate: bool) -> list[Span]:
        marked = self._spans_removed(self._cached(conversation, generate, True))[1]
        if len(marked) > len(indices):
            raise ModelError(
                f"the generation marks of the chat template surround {len(marked)} texts where there are "
                f"{len(indices)} assistant messages; correct the template"
            )
        spans = []
        # Some templates mark only the answers after the last question, those written as they were sampled.
        for i, (start, end) in zip(indices[len(indices) - len(marked) :], marked, strict=True):
            # Templates differ in whether a mark takes in the stop, or white space after it; learned is the stop alone.
            ending = self.answer.stop + self.answer.after
            if text[start:end].endswith(ending):
                end -= len(self.answer.after)
            elif not text[start:end].endswith(self.answer.stop) and text.startswith(self.answer.stop, end):
                end += len(self.answer.stop)
            head = self.text(conversation[:i], generate=True) if i else ""
            # An earlier answer may be written as it was never sampled (its thoughts taken out): the marks say that this
            # is meant. The last answer has to be what the prompt asks for.
            if text.startswith(head):
                spans.append(Span(len(head) if i else start, max(start, len(head)), end, i))
            elif i != indices[-1]:
                spans.append(Span(start, start, end, i))
        return spans

    def _spans_removed(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        if not self.has_generation_marks:
            return marked, []
        text, spans = "", []
        for part in marked.split(_OPEN):
            inside, close, rest = part.partition(_CLOSE)
            if close:
                spans.append((len(text), len(text) + len(inside)))
            text += inside + rest
        return text, spans


def _as_text(marker: re.Match[str]) -> str:
    left, end, right = marker.groups()
    return f"{{%{left} if true %}}{_CLOSE if end else _OPEN}{{% endif {right}%}}"
