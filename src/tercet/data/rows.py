"""What a row of each shape says: one function per shape, from a row to conversations or comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import cast

from tercet.data.turns import (
    HH_TURN,
    BadRow,
    Dropped,
    Row,
    answer_turns,
    compared,
    ends_with_user,
    hh_turns,
    integer,
    messages,
    need,
    optional_text,
    prompt_turns,
    text,
)
from tercet.types import Comparison, Conversation, LabelledAnswer, Message


def messages_row(row: Row) -> Iterator[Conversation | Dropped]:
    """Turns as they are."""
    # Unpaired preference data (KTO) labels answers; the bad ones must not be learned.
    if row.get("label") is False:
        yield Dropped("labelled as a bad answer")
    else:  # an answer with a reward was sampled: a row of tercet prepare --select best
        yield messages(need(row, "messages"), sampled=row.get("reward") is not None)


def prompt_completion(row: Row) -> Iterator[Conversation | Dropped]:
    """A prompt and its answer."""
    if row.get("label") is False:
        yield Dropped("labelled as a bad answer")
    else:
        yield prompt_turns(row) + answer_turns(row, "completion")


def labelled_completion(row: Row) -> Iterator[LabelledAnswer]:
    """A prompt, an answer, and whether it is good."""
    label = need(row, "label")
    if not isinstance(label, bool):
        label = {"true": True, "false": False, "1": True, "0": False}.get(str(label).lower())
    if label is None:
        raise BadRow(f"'label' is {row['label']!r:.40}; it must be true or false")
    yield LabelledAnswer(prompt_turns(row), answer_turns(row, "completion"), label)


def prompt_chosen_reject(row: Row) -> Iterator[Comparison | Dropped]:
    """The same as `prompt_chosen_rejected`, under the names of REBEL's published data."""
    yield from prompt_chosen_rejected(
        {**row, "rejected": row.get("reject"), "rejected_tokens": row.get("reject_tokens")}
    )


def prompt_row(row: Row) -> Iterator[Conversation]:
    """A prompt alone."""
    yield prompt_turns(row)


def prompt_chosen_rejected(row: Row) -> Iterator[Comparison | Dropped]:
    """A prompt and two answers, which may repeat it."""
    chosen, rejected = answer_turns(row, "chosen"), answer_turns(row, "rejected")
    if chosen[0].role == "assistant" and rejected[0].role == "assistant":
        yield from compared(prompt_turns(row), chosen, rejected)
        return
    # The answers repeat the prompt (UltraFeedback); as turns they are the fuller account of it.
    asked = need(row, "prompt")
    if isinstance(asked, str):
        if not any(turn.content.strip() == asked.strip() for turn in chosen):
            raise BadRow("'prompt' is not among the turns of 'chosen'")
        yield from _after_shared_turns(chosen, rejected)
        return
    prompt = prompt_turns(row)
    if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
        raise BadRow("'chosen' and 'rejected' do not begin with the turns of 'prompt'")
    yield from compared(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def chosen_rejected(row: Row) -> Iterator[Comparison | Dropped]:
    """Two conversations that begin with the same prompt."""
    if isinstance(need(row, "chosen"), str) and isinstance(need(row, "rejected"), str):
        yield from _after_shared_words(text(row, "chosen"), text(row, "rejected"))
    else:
        yield from _after_shared_turns(answer_turns(row, "chosen"), answer_turns(row, "rejected"))


def _after_shared_turns(chosen: Conversation, rejected: Conversation) -> Iterator[Comparison | Dropped]:
    if chosen == rejected:
        yield Dropped("both answers are the same")
        return
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != ():
        shared += 1
    prompt = ends_with_user(chosen[:shared], "what chosen and rejected share")
    yield from compared(prompt, chosen[shared:], rejected[shared:])


def _after_shared_words(chosen: str, rejected: str) -> Iterator[Comparison | Dropped]:
    if HH_TURN in chosen:
        raise BadRow("a raw HH dialogue among other text")
    if chosen.strip() == rejected.strip():
        yield Dropped("both answers are the same")
        return
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != "":
        shared += 1
    # Two answers may begin with the same words: cut back to the last line break, or else to the last space.
    cut = chosen.rfind("\n", 0, shared) + 1 or chosen.rfind(" ", 0, shared) + 1
    prompt, first, second = (piece.strip() for piece in (chosen[:cut], chosen[cut:], rejected[cut:]))
    if not (prompt and first and second):
        raise BadRow("'chosen' and 'rejected' do not begin with one prompt, or one has no answer after it")
    yield from compared((Message("user", prompt),), (Message("assistant", first),), (Message("assistant", second),))


def hh(row: Row) -> Iterator[Comparison | Dropped]:
    """Rules of the published recipe; that such rows occur is known, so they are counted and need no flag."""
    words = text(row, "chosen"), text(row, "rejected")
    try:
        chosen, rejected = map(hh_turns, words)
    except BadRow as error:
        yield Dropped(str(error))
        return
    both = (chosen, rejected)
    if len(chosen) != len(rejected):
        yield Dropped("different numbers of turns")
    elif chosen[:-1] != rejected[:-1]:
        yield Dropped("a difference before the last turn")
    elif any(turns[-1].role != "assistant" for turns in both):
        yield Dropped("the last turn is not the assistant's")
    elif any(not turn.content for turns in both for turn in turns):
        yield Dropped("an empty turn")
    elif any(turn.role != ("user", "assistant")[place % 2] for place, turn in enumerate(chosen)):
        yield Dropped("turns do not alternate")
    else:
        yield from compared(chosen[:-1], chosen[-1:], rejected[-1:])


def helpsteer3(row: Row) -> Iterator[Comparison | Dropped]:
    """A context and two answers, the preference between them from -3 (the first) to 3."""
    prompt, preference = prompt_turns(row, "context"), integer(row, "overall_preference")
    yield from _by_preference(prompt, answer_turns(row, "response1"), answer_turns(row, "response2"), preference)


def pandalm(row: Row) -> Iterator[Comparison | Dropped]:
    """An instruction and two answers with the verdicts of annotators; the majority counts."""
    names = ("instruction", "response1", "response2")
    if not all(isinstance(row.get(name), str) and str(row[name]).strip() for name in names):
        yield Dropped("an instruction or an answer without words")  # the published test set has some
        return
    votes = Counter(integer(row, name) for name in row if name.startswith("annotator"))
    (verdict, most), *others = votes.most_common()
    if verdict not in (0, 1, 2):
        raise BadRow(f"a verdict is {verdict}; it must be 0 (tie), 1 or 2")
    if others and others[0][1] == most:
        yield Dropped("the annotators disagree")
        return
    first, second = answer_turns(row, "response1"), answer_turns(row, "response2")
    yield from _by_preference(_instruction(row), first, second, {0: 0, 1: -1, 2: 1}[verdict])


def _by_preference(
    prompt: Conversation, first: Conversation, second: Conversation, preference: int
) -> Iterator[Comparison | Dropped]:
    """Preference below 0: the first is better; above 0: the second; 0: a tie."""
    if preference > 0:
        first, second = second, first
    yield from compared(prompt, first, second, "A" if preference else "Tie")


def _instruction(row: Row, extra: Row | None = None) -> Conversation:
    given = optional_text(row if extra is None else extra, "input")
    words = text(row, "instruction")
    return (Message("user", f"{words}\n{given}" if given else words),)


def _alpaca_prompt(row: Row) -> Conversation:
    system, history = optional_text(row, "system"), row.get("history") or []
    turns = [Message("system", system)] if system else []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("'history' must be a list of pairs: what was asked, what was answered")
    for asked, answered in cast(list[list[object]], history):
        turns += messages([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], "history")
    return (*turns, *_instruction(row))


def alpaca(row: Row) -> Iterator[Conversation]:
    """An instruction, what it is about, and the answer."""
    yield _alpaca_prompt(row) + answer_turns(row, "output")


def alpaca_comparison(row: Row) -> Iterator[Comparison | Dropped]:
    """An instruction and two answers."""
    yield from compared(_alpaca_prompt(row), answer_turns(row, "chosen"), answer_turns(row, "rejected"))


def self_instruct(row: Row) -> Iterator[Conversation]:
    """An instruction with one conversation per instance."""
    instances = need(row, "instances")
    if not isinstance(instances, list) or not all(isinstance(instance, Mapping) for instance in instances):
        raise BadRow("'instances' must be a list of objects with input and output")
    for instance in cast(list[Row], instances):
        yield _instruction(row, instance) + answer_turns(instance, "output")


def _sharegpt_turns(row: Row) -> Conversation:
    turns, system = messages(need(row, "conversations"), "conversations"), optional_text(row, "system")
    return (Message("system", system), *turns) if system else turns


def sharegpt(row: Row) -> Iterator[Conversation | Dropped]:
    """Turns of from and value."""
    # LLaMA-Factory's name of a KTO label.
    yield Dropped("labelled as a bad answer") if row.get("kto_tag") is False else _sharegpt_turns(row)


def sharegpt_ranking(row: Row) -> Iterator[Comparison | Dropped]:
    """Turns of from and value, and two answers."""
    prompt = ends_with_user(_sharegpt_turns(row), "conversations")
    yield from compared(prompt, answer_turns(row, "chosen"), answer_turns(row, "rejected"))
