"""The three stages, each with its rows, its folder and its weights. A stage that is done is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tercet import data
from tercet.algorithms.policy_gradient import RLConfig, policy_gradient
from tercet.algorithms.preference_model import PreferenceConfig, preference_model
from tercet.algorithms.sft import SFTConfig, sft
from tercet.chat.encoding import text_of
from tercet.engine.base import Sampler
from tercet.evaluation.nll import held_out
from tercet.recipes.rows import conversation_data, rows_sha256, train_and_test
from tercet.recipes.session import FREE, Session
from tercet.rewards.judge import Judge
from tercet.rewards.tournament import matches
from tercet.runs.loggers import make_loggers
from tercet.runs.run import Run
from tercet.runs.settings import keep_config
from tercet.types import Comparison, Conversation, Weights


def open_run(
    session: Session,
    directory: Path,
    stage: str,
    config: Mapping[str, object],
    origin: Mapping[str, str],
    *,
    steps: int,
    save_every_steps: int,
    what: str,
) -> Run:
    """The folder of a stage, new or going on.

    Args:
        session: Says what is about to happen.
        directory: The folder.
        stage: sft, preference, judge or rl.
        config: Kept in `config.yaml`, which the stage's verb reads back.
        origin: Hashes of what the stage begins with, rows and weights; kept in `origin.yaml`.
        steps: Of the whole run.
        save_every_steps: Steps between checkpoints.
        what: What a step is, in words.

    Raises:
        ConfigError: The folder was begun with another config, other rows or other weights.
    """
    run = Run(
        directory,
        config=config,
        save_every_steps=save_every_steps,
        total_steps=steps,
        stage=stage,
        loggers=make_loggers(session.setup.log_with),
        may_differ=FREE,
    )
    try:
        keep_config(directory / "origin.yaml", origin)
    except BaseException:
        run.close()
        raise
    session.say(f"{stage}: done before, in {directory}" if run.is_done else f"{stage}: {steps} {what}; in {directory}")
    return run


def run_sft(session: Session, config: SFTConfig, directory: Path) -> Weights:
    """Stage 1: supervised fine-tuning."""
    setup = session.setup
    rows, test = train_and_test(
        data.load_conversations, setup, config.data, config.test_data, config.test_rows, session.say
    )
    learned = conversation_data(session, rows, train_on=config.train_on, max_length=config.max_length)
    tested = conversation_data(session, test, train_on=config.train_on, max_length=config.max_length)
    with open_run(
        session,
        directory,
        "sft",
        session.config_of(SFTConfig, config, out=directory),
        {"rows_sha256": rows_sha256(learned)},
        steps=config.steps(len(learned)),
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.batch_size} conversations, of which there are {len(learned):,}; "
        f"{session.memory(longest_tokens=max((len(d.tokens) for d in learned), default=0))}",
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(lora=setup.adapter, seed=setup.seed)
            text = held_out(tested, lambda tokens: text_of(session.tokenizer, tokens))
            sft(config, learned, text, trainer=trainer, run=run, seed=setup.seed)
        return run.final_weights


def run_preference(
    session: Session,
    config: PreferenceConfig,
    directory: Path,
    rows: Sequence[Comparison],
    test: Sequence[Comparison],
    *,
    init: Weights | None = None,
) -> Weights:
    """Stage 2: a preference model, trained from `init`, or from the base (None)."""
    setup = session.setup
    longest = session.longest(((*row.prompt, *row.a, *row.b) for row in rows), config.max_length)
    with open_run(
        session,
        directory,
        "preference",
        session.config_of(PreferenceConfig, config, policy=place_of(init), out=directory),
        {"rows_sha256": rows_sha256(rows), "policy_sha256": session.fingerprint(init)},
        steps=config.steps(len(rows)),
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.pairs_per_step} comparisons in both orders, of which there are {len(rows):,}; "
        f"{session.memory(longest_tokens=longest, tied=2 if config.label_weight < 1 else 1)}",
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(init=init, lora=setup.adapter, seed=setup.seed)
            shown = session.comparisons(config.max_length)
            preference_model(config, rows, test, shown, trainer=trainer, run=run, seed=setup.seed)
        return run.final_weights


def run_rl(
    session: Session,
    config: RLConfig,
    directory: Path,
    prompts: Sequence[Conversation],
    *,
    init: Weights | None,
    judge: Judge,
    evaluate: Callable[[Sampler, int], Mapping[str, float]],
    kept: Mapping[str, object],
    origin: Mapping[str, str],
) -> Weights:
    """Stage 3: reinforcement learning.

    Args:
        session: Model and machine.
        config: How.
        directory: The run's folder.
        prompts: What is answered.
        init: The policy at the start, which is also the reference; None is the base.
        judge: Decides the tournaments.
        evaluate: Measures a policy now and then.
        kept: The config that the folder keeps.
        origin: Hashes of the weights it begins with.
    """
    setup = session.setup
    played = config.prompts_per_step * len(matches(config.group_size, pattern=config.pattern, chunk=config.chunk))
    longest = max(len(session.renderer.generation_prompt(prompt)) for prompt in prompts)
    # Beside the reference the judge that rewards and one that is held out.
    memory = session.memory(sampled_rows=config.completions_per_step, row_tokens=longest + config.max_tokens, others=3)
    with open_run(
        session,
        directory,
        "rl",
        kept,
        {"rows_sha256": rows_sha256(prompts), **origin},
        steps=config.steps,
        save_every_steps=config.save_every_steps,
        what=f"steps of {config.prompts_per_step} prompts x {config.group_size} answers = "
        f"{config.completions_per_step} answers, which meet in {played} matches ({config.judge} verdicts), "
        f"{len(prompts):,} prompts in all; {memory}",
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(init=init, lora=setup.adapter, seed=setup.seed)
            reference = session.engine.sampler(init)
            policy_gradient(
                config, prompts, session.renderer, judge, reference,
                trainer=trainer, run=run, evaluate=evaluate, seed=setup.seed, foreign_sampler=setup.sampler != "local",
            )  # fmt: skip
        return run.final_weights


def place_of(weights: Weights | None) -> str:
    """Where weights lie, as the setting `policy` of a verb names them."""
    return "base" if weights is None else str(weights.path)
