"""A conversation and one answer to it, as the tokens that a reward model scores."""

from __future__ import annotations

from tercet.chat.renderers import Renderer
from tercet.errors import DataError
from tercet.types import Conversation


class AnswerRenderer:
    """Renders prompt and answer as a conversation that is over, the end of the last turn included.

    A reward model reads its score at the last of these tokens; in training and in use they are the same, whatever
    tokens the answer was sampled as.
    """

    def __init__(self, renderer: Renderer, limit: int) -> None:
        """Take a renderer of conversations, and the most tokens of prompt and answer together."""
        self.renderer, self.limit = renderer, limit

    def tokens(self, prompt: Conversation, answer: Conversation) -> tuple[int, ...]:
        """Tokens of prompt and answer, at most `limit`; longer ones lose the beginning of the prompt, but for BOS.

        Raises:
            DataError: The answer alone exceeds the limit, or the conversation cannot be rendered.
        """
        tokens = tuple(self.renderer.datum((*prompt, *answer), train_on="all_tokens").tokens)
        excess = len(tokens) - self.limit
        if excess <= 0:
            return tokens
        first = int(tokens[0] == self.renderer.tokenizer.bos_token_id)
        droppable = len(self.renderer.generation_prompt(prompt)) - first
        if droppable < excess:
            raise DataError(
                f"an answer takes {len(tokens) - droppable} tokens, and the limit is {self.limit}; drop it, shorten it "
                "or raise the limit"
            )
        return tokens[:first] + tokens[first + excess :]
