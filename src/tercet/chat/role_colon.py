"""Plain text for base models: `User: Hi\\n\\nAssistant: Hello.\\n\\n`."""

from __future__ import annotations

from collections.abc import Sequence

from tercet.chat.encoding import Encoder, Tokenizer, text_of
from tercet.chat.pieces import Piece, Termination, learn, learned_messages
from tercet.errors import DataError
from tercet.types import Conversation, Datum, Message

STOP = "\n\nUser:"
OVERLAP = "User:"


class RoleColon:
    """Header `Role:` and output ` content\\n\\n`, each tokenised apart; BOS in front when the tokenizer has one.

    An answer ends where the next user turn begins, so the stop is `\\n\\nUser:`. Its first half ends every message; its
    second half, `User:`, is appended to a conversation that ends in a learned assistant message, and learned with it.

    Follows the renderer of the same name in tinker-cookbook.
    """

    name: str = "role_colon"
    stop: tuple[str | int, ...] = (STOP,)
    opening: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._encode = Encoder(tokenizer)

    def generation_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the conversation and the header of the assistant's answer."""
        pieces = [*self._pieces(conversation), Piece(self._encode("Assistant:", first=not conversation))]
        return [token for piece in pieces for token in piece.tokens]

    def datum(
        self, conversation: Conversation, *, train_on: str = "all_assistant_messages", limit: int | None = None
    ) -> Datum:
        """The conversation with weight 1 on what is learned.

        Raises:
            ConfigError: `train_on` is unknown.
            DataError: Nothing is learned, or there are more than `limit` tokens.
        """
        pieces = self._pieces(conversation)
        last = len(conversation) - 1
        if conversation and conversation[last].role == "assistant" and last in learned_messages(conversation, train_on):
            pieces.append(Piece(self._encode(OVERLAP), last))
        return learn(pieces, conversation, train_on=train_on, limit=limit)

    def parse(self, tokens: Sequence[int]) -> tuple[Message, Termination]:
        """The answer in sampled tokens, and how it ended.

        `stop`: the next user turn begins, once. `eos`: the tokenizer's EOS, and no user turn. Anything else, a sample
        cut at its token limit among them, is `malformed`; its content ends where a user turn begins.
        """
        eos = self.tokenizer.eos_token_id
        ends_in_eos = eos is not None and list(tokens[-1:]) == [eos]
        text = text_of(self.tokenizer, tokens, special=False)
        ended: Termination = "malformed"
        if text.count(STOP) == 1 and eos not in tokens:
            ended = "stop"
        elif ends_in_eos and STOP not in text and eos not in tokens[:-1]:
            ended = "eos"
        # The stop begins with the blank line that ends every message, so this takes it off once.
        content = text.split(STOP)[0] if STOP in text else text.removesuffix("\n\n")
        return Message("assistant", content.removeprefix(" ")), ended

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        bos = self.tokenizer.bos_token_id
        pieces = [] if bos is None else [Piece((bos,))]
        for index, message in enumerate(conversation):
            if not message.role:
                raise DataError(f"message {index} has an empty role; it must be system, user or assistant")
            pieces.append(Piece(self._encode(f"{message.role.capitalize()}:", first=index == 0)))
            pieces.append(Piece(self._encode(f" {message.content}\n\n"), index))
        return pieces
