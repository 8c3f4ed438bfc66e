"""REBEL: generate, score, prepare, learn, and again from the new policy; or the last part alone, on given pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tercet import data
from tercet.algorithms.pairs import Pair, with_reference
from tercet.algorithms.policy_gradient import SEEDS_PER_RUN
from tercet.algorithms.prepare import SelectionConfig, prepare
from tercet.algorithms.rebel import RebelConfig, rebel
from tercet.config import to_mapping
from tercet.data.groups import RankedPair, load_groups, load_ranked_pairs
from tercet.errors import ConfigError, DataError
from tercet.recipes.generating import AnswersConfig, longest_answer, user_place, write_answers
from tercet.recipes.preparing import drawn_at, tokens_of, write_prepared
from tercet.recipes.reference import reference_logprobs, rows_reached
from tercet.recipes.rows import count_left_out, rows_sha256
from tercet.recipes.scoring import RewardsConfig, check_rewards, rewards_of, write_scores
from tercet.recipes.session import FREE, Say, Session, SetupConfig, decided_here, open_session
from tercet.recipes.stages import open_run
from tercet.recipes.trained import check_same_base, weights_at
from tercet.rewards.combined import WeightedSum
from tercet.runs.settings import keep_config
from tercet.types import Conversation, Datum, Weights

BEGIN = "start.safetensors"
"""Log-probs of the very first policy, where the rewards pay for leaving it."""


@dataclass(frozen=True, kw_only=True)
class RebelRunConfig(RebelConfig, RewardsConfig, SetupConfig):
    """Learn from the policy's own answers, ranked: generate, score, prepare, learn, and again."""

    policy: str = "base"
    """The policy to start from: the folder of a run, an adapter's directory, or base. Of prepared pairs it must be the
    one that answered."""
    data: str = "builtin"
    """Prompts: those of conversations or comparisons, from builtin, the hub, or files."""
    prompts: int | None = 96
    """Prompts answered in an iteration, at most; null takes all."""
    answers: AnswersConfig = field(default_factory=lambda: AnswersConfig(max_tokens=48))
    """How the policy answers them."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """What becomes of the scored answers."""
    iterations: int = 1
    """How often the four parts are done, each time from the last policy."""
    shards: int = 1
    """Parts the prompts are cut into; every iteration has the next one."""
    prepared: str | None = None
    """Pairs that are there already, as tercet prepare writes them: only the last part is done."""
    out: str = "runs/rebel"
    """Folder of the run; the same command goes on where it stood."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or self.shards < 1 or (self.prompts is not None and self.prompts < 1):
            raise ConfigError(
                f"iterations is {self.iterations}, shards {self.shards}, prompts {self.prompts}; none may be below 1"
            )
        if self.prepared is not None and self.iterations > 1:
            raise ConfigError("prepared pairs are of one policy; leave iterations at 1, or let it generate its own")
        if self.prepared is not None and self.kl_coef:
            raise ConfigError(
                f"kl_coef is {self.kl_coef}, which pays for leaving the first policy, and prepared pairs do not say "
                "what that was; leave kl_coef at 0, or let tercet rebel do all parts, with --iterations"
            )
        if self.selection.select == "best":
            raise ConfigError("selection.select is best, which gives no pairs; take best_worst, all_pairs or top_k")


def train_rebel(config: RebelRunConfig, *, say: Say = print) -> Path:
    """Do the four parts as often as is asked. Returns the folder of the last policy."""
    if config.prepared is None:
        check_rewards(config)
    else:
        _check_temperature(config, config.prepared)
    check_same_base(config, config.policy, user_place(config.answers.user), *config.places().values())
    start = weights_at(config.policy, "policy")
    session = open_session(config, say)
    root = Path(config.out)
    if config.prepared is not None:
        test = "test" in data.splits(config.prepared, purpose="prompts")
        pairs = load_ranked_pairs(config.prepared)
        held_out = load_ranked_pairs(config.prepared, split="test") if test else []
        run_rebel(session, config, root, pairs, held_out, init=start, first=start)
        return root
    rewards, hashes = rewards_of(session, config)
    prompts = _prompts(session, config)
    root.mkdir(parents=True, exist_ok=True)
    keep_config(root / "config.yaml", to_mapping(config), may_differ=FREE | decided_here(config))
    origin = {"rows_sha256": rows_sha256(prompts), "policy_sha256": session.fingerprint(start), **hashes}
    keep_config(root / "origin.yaml", origin)
    weights, folder = start, root
    for iteration in range(config.iterations):
        folder = root / f"iteration-{iteration + 1}"
        part = prompts[iteration % config.shards :: config.shards][: config.prompts]
        if not part:
            raise DataError(
                f"{len(prompts)} prompts in {config.shards} shards leave none for iteration {iteration + 1}"
            )
        say(f"iteration {iteration + 1} of {config.iterations}: {len(part):,} prompts")
        weights = iterate(
            session, config, folder, part, rewards, init=weights, first=start, iteration=iteration, hashes=hashes
        )
    return folder


def iterate(
    session: Session,
    config: RebelRunConfig,
    folder: Path,
    prompts: Sequence[Conversation],
    rewards: WeightedSum,
    *,
    init: Weights | None,
    first: Weights | None,
    iteration: int,
    hashes: Mapping[str, object],
) -> Weights:
    """The four parts once; a part whose file is there is done.

    Args:
        session: Model and machine.
        config: How.
        folder: Of this iteration: answers, scores, pairs, and the run.
        prompts: What is answered.
        rewards: What scores the answers.
        init: The policy that answers and learns.
        first: The policy before the first iteration.
        iteration: Counted from 0.
        hashes: What the rewards are made of.
    """
    answers, scored, pairs = folder / "answers.jsonl", folder / "scored.jsonl", folder / "pairs"
    seed = config.seed * SEEDS_PER_RUN + iteration * len(prompts)
    if not answers.exists():
        session.say(f"generate: {config.answers.n} answers to each prompt, into {answers}")
        write_answers(
            session, session.engine.sampler(init), prompts, config.answers, answers,
            temperature=config.temperature, seed=seed,
        )  # fmt: skip
    if not scored.exists():
        session.say(f"score: {', '.join(rewards.sources)}, into {scored}")
        write_scores(load_groups(str(answers)), rewards, scored, hashes=hashes)
    if not pairs.exists():

        def tokenised(prompt: Conversation, words: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
            return tokens_of(session.renderer, prompt, words)

        made = prepare(config.selection, load_groups(str(scored)), tokenised, seed=config.seed)
        for line in made.describe():
            session.say(f"prepare: {line}")
        write_prepared(made, pairs, select=config.selection.select, made_of=to_mapping(config.selection))
    learned = load_ranked_pairs(str(pairs))
    held_out = load_ranked_pairs(str(pairs), split="test") if (pairs / "test.jsonl").exists() else []
    return run_rebel(session, config, folder, learned, held_out, init=init, first=first)


def run_rebel(
    session: Session,
    config: RebelRunConfig,
    directory: Path,
    rows: Sequence[RankedPair],
    test: Sequence[RankedPair],
    *,
    init: Weights | None,
    first: Weights | None,
) -> Weights:
    """The regression: learn pairs with rewards from the policy that answered.

    Args:
        session: Model and machine.
        config: How.
        directory: The run's folder.
        rows: Pairs to learn.
        test: Pairs held out.
        init: The policy that answered, and learns.
        first: The one that `kl_coef` pays for leaving.
    """
    learned, tested = ranked_data(session, rows, "to learn"), ranked_data(session, test, "held out")
    if not learned:
        raise DataError("no pair fits into the model; prepare with a lower max_prompt_length and max_answer_length")
    longest = max(len(datum.tokens) for pair in learned for datum in pair.data)
    with open_run(
        session,
        directory,
        "rebel",
        session.config_of(RebelRunConfig, config),
        {
            "rows_sha256": rows_sha256([learned, tested]),
            "policy_sha256": session.fingerprint(init),
            "first_sha256": session.fingerprint(first),
        },
        steps=config.steps(len(learned)),
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.pairs_per_step} pairs, of which there are {len(learned):,}; "
        f"{session.memory(longest_tokens=longest, tied=2)}",
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(init=init, lora=config.adapter, seed=config.seed)
            needed = rows_reached(
                len(learned), config.steps(len(learned)), config.pairs_per_step, config.epochs, seed=config.seed
            )
            every = [*(learned[i] for i in needed), *tested]
            flat = [datum for pair in every for datum in pair.data]
            ours = reference_logprobs(directory, trainer, flat, say=session.say, temperature=config.temperature)
            if config.kl_coef and first != init:
                beginner = session.engine.trainer(init=first, lora=config.adapter, seed=config.seed)
                theirs = reference_logprobs(
                    directory, beginner, flat, say=session.say, temperature=config.temperature, file=BEGIN
                )
                every = charged(every, ours, theirs, config.kl_coef)
            every = with_reference(every, ours)
            for i, pair in zip(needed, every, strict=False):
                learned[i] = pair
            rebel(config, learned, every[len(needed) :], trainer=trainer, run=run, seed=config.seed)
        return run.final_weights


def charged(
    pairs: Sequence[Pair], ours: Sequence[Sequence[float]], first: Sequence[Sequence[float]], kl_coef: float
) -> list[Pair]:
    """Pairs whose answers pay, off their rewards, for being likelier than under the first policy.

    Args:
        pairs: With reward gaps.
        ours: Log-probs of the policy that answered, for the chosen and the rejected answer of each pair in turn.
        first: Those of the first policy.
        kl_coef: Reward per nat.
    """
    ratios = [sum(a) - sum(b) for a, b in zip(ours, first, strict=True)]
    return [
        replace(pair, reward_gap=pair.reward_gap - kl_coef * (ratios[2 * i] - ratios[2 * i + 1]))
        for i, pair in enumerate(pairs)
    ]


def ranked_data(session: Session, rows: Sequence[RankedPair], what: str) -> list[Pair]:
    """Pairs with rewards as sequences; those that the model cannot take are left out and counted aloud.

    Answers keep the tokens they were sampled as; those that come as text get the renderer's, which is said.
    """

    def datum(prompt: Sequence[int], tokens: Sequence[int]) -> Datum:
        return Datum((*prompt, *tokens), [0.0] * len(prompt) + [1.0] * len(tokens))

    pairs, rendered = [], 0
    for row in rows:
        sides = []
        for each in (row.chosen, row.rejected):
            prompt, tokens = row.prompt_tokens, each.tokens
            if prompt is None or tokens is None:
                rendered += 1
                asked, words = tokens_of(session.renderer, row.prompt, each.text)
                prompt, tokens = asked if prompt is None else prompt, words if tokens is None else tokens
            sides.append(datum(prompt, tokens))
        assert row.chosen.reward is not None and row.rejected.reward is not None
        pairs.append(Pair(sides[0], sides[1], row.chosen.reward - row.rejected.reward))
    if rendered:
        session.say(
            f"{rendered:,} of {2 * len(rows):,} answers {what} come without tokens, or their prompts do; they "
            "get the renderer's"
        )
    limit = session.engine.context_tokens
    kept = [pair for pair in pairs if max(len(each.tokens) for each in pair.data) <= limit]
    count_left_out(session, pairs, kept, f"pairs {what} have more than {limit} tokens")
    return kept


def _check_temperature(config: RebelRunConfig, prepared: str) -> None:
    drawn = drawn_at(prepared)
    if drawn and drawn != [config.temperature]:
        raise ConfigError(
            f"the answers in {prepared} were drawn at temperature {' and '.join(map(str, drawn))}, and log-probs would "
            f"be taken at {config.temperature}, where they are not those of what answered; "
            + (f"give --temperature {drawn[0]}" if len(drawn) == 1 else "prepare answers of one temperature")
        )


def _prompts(session: Session, config: RebelRunConfig) -> list[Conversation]:
    """The prompts in the order of the seed, without those that are too long."""
    loaded = data.load_prompts(config.data, skip_bad_rows=config.skip_bad_rows)
    session.say(loaded.describe())
    room = session.engine.context_tokens - longest_answer(session, config.answers)
    limit = min(config.selection.max_prompt_length, room)
    kept = [row for row in loaded.rows if len(session.renderer.generation_prompt(row)) <= limit]
    count_left_out(session, loaded.rows, kept, f"prompts have more than {limit} tokens")
    if not kept:
        raise DataError(f"{config.data} leaves no prompt of at most {limit} tokens; raise selection.max_prompt_length")
    return [kept[i] for i in data.order(len(kept), seed=config.seed, epoch=0)]
