"""Answers to a file of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tercet import data
from tercet.algorithms.dialogues import Grown, User, branched, branches
from tercet.algorithms.prepare import DRAWN_AT
from tercet.algorithms.rollouts import answer
from tercet.config import to_mapping
from tercet.data.groups import Columns, Group, Sampled
from tercet.engine.base import Sampler
from tercet.errors import ConfigError, DataError, UsageError
from tercet.recipes.foreign import ForeignModel
from tercet.recipes.row_files import check_new, write_rows
from tercet.recipes.rows import count_left_out, rows_sha256
from tercet.recipes.session import FREE, Say, Session, check_positive, open_session, settings_of
from tercet.recipes.trained import BASE, TrainedConfig, policy_at
from tercet.rewards.functions import load_function
from tercet.types import Conversation, Message, SamplingParams, as_messages

# Answers are a function of (seed, place of the prompt): the size of a batch must not be a setting.
PROMPTS_AT_ONCE = 64
USER_TASK = "This is a conversation between a user and an assistant. Write only what the user says next."
"""How a policy is asked to speak as the user; the dialogue follows."""
SILENCE = "Go on."
"""What is taken for the words of a user that says nothing."""


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """How many answers a prompt gets, and how they are drawn."""

    n: int = 5
    """Answers per prompt, each from random numbers of its own."""
    max_tokens: int = 2048
    """Longest answer in tokens; at most half of what the model takes."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that hold this share of the probability."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 from all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    turns: int = 1
    """Answers are drawn at a random turn of a dialogue of up to so many, and each is rolled out to its end (REFUEL)."""
    user: str | None = None
    """Who speaks as the user then: a Python function, as file.py:name or package.module:name, or a policy."""

    def __post_init__(self) -> None:
        if self.turns < 1 or self.n < 1:
            raise ConfigError(f"turns is {self.turns} and n {self.n}; both must be at least 1")
        if (self.turns > 1) != (self.user is not None):
            raise ConfigError(f"turns is {self.turns} and user {self.user}; a dialogue of several turns wants a user")

    def params(self, temperature: float, *, stop: tuple[str | int, ...], seed: int, context: int) -> SamplingParams:
        """For the sampler of a model that takes `context` tokens."""
        return SamplingParams(
            max_tokens=min(self.max_tokens, context // 2),
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=stop,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnswersConfig, TrainedConfig):
    """Answer prompts from a file into a jsonl or parquet file."""

    policy: str = BASE
    """The policy: the folder of a run, an adapter's directory, or base."""
    sampler: Literal["local", "vllm"] = "local"
    """What draws answers: local, or vllm (docs/engine.md)."""
    endpoint: str | None = None
    """Ask an OpenAI-compatible server at this address (…/v1) instead of a policy; OPENAI_API_KEY is sent if set."""
    endpoint_model: str | None = None
    """The model's name at that server."""
    data: str = "builtin"
    """Prompts: those of conversations or comparisons, from builtin, the hub, or files."""
    split: str = "train"
    """The split of the data."""
    rows: int | None = None
    """Prompts, at most, from the beginning; null takes all."""
    out: Path
    """A jsonl or parquet file; it must not exist. Stopped, the same command goes on."""
    columns: Columns = "tercet"
    """tercet: prompt and completions; published: prompt, response_0, response_1 and so on."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and prompts too long for the model, and count them."""


def generate(config: GenerateConfig, *, say: Say = print) -> Path:
    """Write one row per prompt with its answers: text, tokens, logprobs and stop_reason of each.

    Raises:
        UsageError: The file exists.
    """
    check_new(config.out)
    check_positive({"rows": 1 if config.rows is None else config.rows})
    config.params(config.temperature, stop=(), seed=0, context=2 * config.max_tokens)  # refuses what makes no sense
    if config.endpoint is not None:
        return _ask_server(config, config.endpoint, say)
    setup = replace(config.setup(config.policy, user_place(config.user)), sampler=config.sampler)
    session = open_session(setup, say)
    prompts = _prompts(session, config)
    sampler = policy_at(session, config.policy)
    say(f"{config.policy} answers {len(prompts):,} prompts, {config.n} times each, into {config.out}")
    return write_answers(
        session, sampler, prompts, config, config.out,
        temperature=config.temperature, seed=config.seed, columns=config.columns, made_of=_made_of(config),
    )  # fmt: skip


def write_answers(
    session: Session,
    sampler: Sampler,
    prompts: Sequence[Conversation],
    config: AnswersConfig,
    out: Path,
    *,
    temperature: float,
    seed: int,
    columns: Columns = "tercet",
    made_of: Mapping[str, object] | None = None,
) -> Path:
    """Answer every prompt into a file; it goes on where it stood.

    Args:
        session: Renderer and model.
        sampler: Answers.
        prompts: What is asked.
        config: How.
        out: A jsonl or parquet file.
        temperature: Of the sampler.
        seed: An answer is a function of it, the prompt's place and its own number.
        columns: How a row is written.
        made_of: What else decides the rows.
    """

    user = None if config.user is None else simulated_user(session, config.user)
    ended_early: list[bool] = []

    def make(at: int, end: int) -> Iterator[dict[str, Any]]:
        context = session.engine.context_tokens
        params = config.params(temperature, stop=session.renderer.stop, seed=seed + at, context=context)
        asked, chat = prompts[at:end], session.renderer
        if user is not None:
            where = branches(len(asked), config.turns, seed=seed + at)
            grown = branched(asked, where, sampler, chat, params, config.n, user=user, context_tokens=context)
            for prompt, place, group in zip(asked, where, grown, strict=True):
                turns = len(prompt) + 2 * place.end
                ended_early.extend(len(each.answer.prompt) + len(each.after) < turns for each in group)
                yield _row(group, columns, temperature)
            return
        for answers in answer(asked, sampler, chat, params, config.n):
            yield _row([Grown(each, ()) for each in answers], columns, temperature)

    facts = {
        **settings_of(AnswersConfig, config),
        "temperature": temperature,
        "seed": seed,
        "prompts_sha256": rows_sha256(prompts),
        "policy_sha256": sampler.fingerprint()[:16],
        **(made_of or {}),
    }
    written = write_rows(out, facts, len(prompts), make, verb="generate", at_once=PROMPTS_AT_ONCE)
    if any(ended_early):
        many = f"{sum(ended_early):,} of {len(ended_early):,} dialogues"
        session.say(f"{many} left no room for another answer and ended before their last turn")
    return written


def longest_answer(session: Session, config: AnswersConfig) -> int:
    """How many tokens an answer may have: half of what the model takes at most, which is said where it cuts."""
    context = session.engine.context_tokens
    found = min(config.max_tokens, context // 2)
    if found < config.max_tokens:
        session.say(f"the model takes {context} tokens: answers end at {found}, not at {config.max_tokens}")
    return found


def user_place(user: str | None) -> str | None:
    """A user that is a policy has settings of its own; a function has none."""
    return None if user is None or ":" in user else user


def _row(group: Sequence[Grown], columns: Columns, temperature: float) -> dict[str, Any]:
    answers = []
    for each in group:
        drawn = each.answer.completion
        words = each.answer.message.content
        answers.append(Sampled(words, drawn.tokens, drawn.logprobs, drawn.stop_reason, after=each.after))
    first = group[0].answer
    return Group(first.prompt, tuple(answers), first.prompt_tokens, {DRAWN_AT: temperature}).row(columns)


def simulated_user(session: Session, place: str) -> User:
    """The user's side of a dialogue: a function of dialogues, or a policy that is shown the dialogue as a text."""
    if ":" in place:
        function = load_function(place)

        def spoken(dialogues: Sequence[Conversation], params: SamplingParams) -> list[str]:
            said = function([as_messages(dialogue) for dialogue in dialogues])
            if len(said) != len(dialogues) or not all(isinstance(words, str) and words.strip() for words in said):
                raise DataError(f"the user {place} gave {said!r:.80} for {len(dialogues)} dialogues; each wants words")
            return list(said)

        return spoken
    sampler = policy_at(session, place, "user")

    def sampled(dialogues: Sequence[Conversation], params: SamplingParams) -> list[str]:
        asked: list[Conversation] = []
        for dialogue in dialogues:
            written = "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in dialogue)
            asked.append((Message("user", f"{USER_TASK}\n\n{written}"),))
        groups = answer(asked, sampler, session.renderer, params, 1)
        return [group[0].message.content.strip() or SILENCE for group in groups]

    return sampled


def _made_of(config: GenerateConfig) -> dict[str, object]:
    free = {*FREE, "max_rows", "data", "rows", "split", "skip_bad_rows", "device", "trust_remote_code"}
    settings: Mapping[str, object] = to_mapping(config)
    return {name: value for name, value in settings.items() if name not in free}


def _ask_server(config: GenerateConfig, endpoint: str, say: Say) -> Path:
    if config.turns > 1:
        raise UsageError("a server is asked for single answers; leave turns at 1, or take a policy")
    if config.top_k or config.min_p:
        raise UsageError(
            f"top_k is {config.top_k} and min_p {config.min_p}, and the protocol of a server has neither; leave both "
            "at 0, or take a policy"
        )
    if config.endpoint_model is None:
        raise UsageError("which model of the server answers? Give --endpoint-model NAME")
    model = ForeignModel(endpoint, config.endpoint_model)
    loaded = data.load_prompts(
        config.data, split=config.split, skip_bad_rows=config.skip_bad_rows, max_rows=config.rows
    )
    say(loaded.describe())
    say(f"{config.endpoint_model} at {endpoint} answers {len(loaded.rows):,} prompts, {config.n} times each")

    def make(at: int, end: int) -> Iterator[dict[str, Any]]:
        for place in range(at, end):
            prompt = loaded.rows[place]
            answers = model.answers(
                prompt, config.n, temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens,
                seed=config.seed + place,
            )  # fmt: skip
            yield Group(prompt, tuple(answers), columns={DRAWN_AT: config.temperature}).row(config.columns)

    facts = {**_made_of(config), "prompts_sha256": rows_sha256(loaded.rows)}
    return write_rows(config.out, facts, len(loaded.rows), make, verb="generate", at_once=1)


def _prompts(session: Session, config: GenerateConfig) -> list[Conversation]:
    skip = config.skip_bad_rows
    loaded = data.load_prompts(config.data, split=config.split, skip_bad_rows=skip, max_rows=config.rows)
    session.say(loaded.describe())
    max_tokens = longest_answer(session, config)
    limit = session.engine.context_tokens - max_tokens
    lengths = [len(session.renderer.generation_prompt(prompt)) for prompt in loaded.rows]
    long = [i for i, length in enumerate(lengths) if length > limit]
    if long and not skip:
        raise DataError(
            f"{config.data}: prompt {long[0] + 1} has {lengths[long[0]]} tokens, and beside an answer of {max_tokens} "
            f"the model takes {limit}; shorten it, lower max_tokens, or pass --skip-bad-rows to leave such prompts out"
        )
    kept = [prompt for prompt, length in zip(loaded.rows, lengths, strict=True) if length <= limit]
    count_left_out(session, loaded.rows, kept, f"prompts have more than {limit} tokens")
    if not kept:
        raise DataError(f"every prompt of {config.data} has more than {limit} tokens")
    return kept
