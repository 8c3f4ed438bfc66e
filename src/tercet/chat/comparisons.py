"""Two answers and the question which is better, as one prompt whose answer is a label.

The format is that of tinker-cookbook's preference models: the conversation, then system messages as headings, between
them the answers, and the label as the assistant's message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from tercet.chat.encoding import text_of
from tercet.chat.renderers import Renderer
from tercet.errors import DataError, ModelError
from tercet.types import Comparison, Conversation, Datum, Label, Message

HEADING_A = "==== Completion A ===="
HEADING_B = "==== Completion B ===="
HEADING_LABEL = "==== Preference ===="

LABELS: tuple[Label, ...] = get_args(Label)

_PROBE = Comparison(
    prompt=(Message("user", "Hi"),), a=(Message("assistant", "Hello."),), b=(Message("assistant", "No."),)
)


class ComparisonRenderer:
    """Renders comparisons with a chat renderer; `labels` holds the token by which each label begins.

    Headings are system messages. A chat template that refuses or drops system messages in the middle of a conversation
    gets them as user messages, joined to a user's message right before them.
    """

    def __init__(self, renderer: Renderer, limit: int) -> None:
        """Find out how the renderer takes headings, and how it begins each label.

        Args:
            renderer: How conversations are rendered.
            limit: Most tokens of a prompt and its label together.

        Raises:
            ModelError: Two labels begin with the same token, so that the first token does not tell them apart; or the
                chat template takes headings in neither role.
        """
        self.renderer = renderer
        self.limit = limit
        self._heading_role = self._accepted_heading_role()
        self.labels: dict[Label, int] = self._first_label_tokens()

    def prompt(self, comparison: Comparison) -> list[int]:
        """Tokens up to where the label is asked for, at most `limit - 1`.

        Over-long comparisons lose tokens from the left of the conversation, but for BOS; never of the answers. Other
        comparisons of one conversation begin alike, and go on alike while their first answers are the same.

        Raises:
            DataError: The answers alone exceed the limit, or there is neither answer.
        """
        tokens = [*self.renderer.generation_prompt(self._conversation(comparison)), *self.renderer.opening]
        excess = len(tokens) + 1 - self.limit
        if excess <= 0:
            return tokens
        first = int(tokens[0] == self.renderer.tokenizer.bos_token_id)
        droppable = self._length_of_conversation(comparison, tokens) - first
        if droppable < excess:
            needed = len(tokens) + 1 - max(droppable, 0)
            raise DataError(
                f"the answers of a comparison take {needed} tokens with their headings and the label, "
                f"and the limit is {self.limit}; drop the comparison, shorten its answers or raise the limit"
            )
        return tokens[:first] + tokens[first + excess :]

    def datum(self, comparison: Comparison) -> Datum:
        """The prompt and the first token of its label, which alone has weight (1.0).

        Raises:
            DataError: The comparison has no label, or see `prompt`.
        """
        if comparison.label is None:
            raise DataError("a comparison without a label cannot be learned; it must be A, B or Tie")
        prompt = self.prompt(comparison)
        return Datum(tokens=(*prompt, self.labels[comparison.label]), weights=(*(0.0 for _ in prompt), 1.0))

    def _conversation(self, comparison: Comparison) -> Conversation:
        if not comparison.a and not comparison.b:
            raise DataError("a comparison has neither answer; it needs at least one")
        sections = ((HEADING_A, comparison.a), (HEADING_B, comparison.b))
        messages = list(comparison.prompt)
        for heading, answer in sections:
            if answer:
                self._append_heading(messages, heading)
                messages.extend(answer)
        self._append_heading(messages, HEADING_LABEL)
        return tuple(messages)

    def _append_heading(self, messages: list[Message], heading: str) -> None:
        if self._heading_role == "user" and messages and messages[-1].role == "user":
            # Templates that refuse system messages tend to refuse two user messages in a row as well.
            messages[-1] = replace(messages[-1], content=f"{messages[-1].content}\n\n{heading}")
        else:
            messages.append(Message(self._heading_role, heading))

    def _accepted_heading_role(self) -> str:
        refusals = []
        for role in ("system", "user"):
            self._heading_role = role
            try:
                if self._writes_all(self._conversation(_PROBE)):
                    return role
            except DataError as error:
                refusals.append(str(error))
            else:
                refusals.append(f"{role} messages after the first are not written")
        raise ModelError(
            f"the {self.renderer.name} renderer cannot write comparisons: {'; '.join(refusals)}. "
            "Use the role_colon renderer for the preference model"
        )

    def _writes_all(self, conversation: Conversation) -> bool:
        # Some templates skip messages without a word: each message must leave a trace.
        prompt = self.renderer.generation_prompt(conversation)
        changed = (
            (*conversation[:i], replace(message, content=f"{message.content} Other."), *conversation[i + 1 :])
            for i, message in enumerate(conversation)
        )
        return all(self.renderer.generation_prompt(other) != prompt for other in changed)

    def _first_label_tokens(self) -> dict[Label, int]:
        question = self._conversation(_PROBE)
        start = len(self.renderer.generation_prompt(question))
        labels: dict[Label, int] = {}
        for label in LABELS:
            answered = (*question, Message("assistant", label))
            output = tuple(self.renderer.datum(answered, train_on="last_assistant_message").tokens[start:])
            opening = self.renderer.opening
            labels[label] = output[len(opening) if output[: len(opening)] == opening else 0]
        if len(set(labels.values())) < len(labels):
            starts = {label: text_of(self.renderer.tokenizer, [token]) for label, token in labels.items()}
            raise ModelError(
                f"with the {self.renderer.name} renderer the labels begin with the tokens {starts}, which do not tell "
                "them apart: the preference model would learn nothing. Use another renderer or tokenizer"
            )
        return labels

    def _length_of_conversation(self, comparison: Comparison, tokens: Sequence[int]) -> int:
        if not comparison.prompt:
            return 0
        alone = self.renderer.datum(comparison.prompt, train_on="all_tokens").tokens
        return next((i for i, pair in enumerate(zip(alone, tokens, strict=False)) if pair[0] != pair[1]), len(alone))
