"""The three stages, each with its data, its folder and its weights. A stage that is done is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tercet import data
from tercet.algorithms.policy_gradient import RLConfig, policy_gradient
from tercet.algorithms.preference_model import PreferenceConfig, preference_model
from tercet.algorithms.sft import SFTConfig, sft
from tercet.engine.base import Sampler
from tercet.evaluation.nll import held_out
from tercet.recipes.session import (
    FREE,
    Session,
    conversation_data,
    train_and_test,
    usable_comparisons,
    usable_prompts,
)  # fmt: skip
from tercet.rewards.judge import Judge
from tercet.runs.loggers import make_loggers
from tercet.runs.run import Run
from tercet.types import Comparison, Conversation, Weights


def open_run(
    session: Session, directory: Path, stage: str, config: Mapping[str, object], *, steps: int, save_every_steps: int
) -> Run:
    """The folder of a stage, new or going on."""
    run = Run(
        directory,
        config=config,
        save_every_steps=save_every_steps,
        total_steps=steps,
        stage=stage,
        loggers=make_loggers(session.setup.log_with),
        may_differ=FREE,
    )
    session.say(f"{stage}: done before, in {directory}" if run.is_done else f"{stage}: {steps} steps, in {directory}")
    return run


def run_sft(session: Session, config: SFTConfig, directory: Path) -> Weights:
    """Stage 1: supervised fine-tuning."""
    setup = session.setup
    rows, test = train_and_test(
        data.load_conversations, setup, config.data, config.test_data, config.test_rows, session.say
    )
    learned = conversation_data(session, rows, train_on=config.train_on, max_length=config.max_length)
    tested = conversation_data(session, test, train_on=config.train_on, max_length=config.max_length)
    kept = session.config_of("sft", config)
    with open_run(
        session, directory, "sft", kept, steps=config.steps(len(learned)), save_every_steps=config.save_every_steps
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(lora=setup.adapter, seed=setup.seed)
            text = held_out(tested, session.engine.loaded.tokenizer.decode)
            sft(config, learned, text, trainer=trainer, run=run, seed=setup.seed)
        return run.final_weights


def load_pairs(session: Session, config: PreferenceConfig) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons to learn, and held out."""
    rows, test = train_and_test(
        data.load_comparisons, session.setup, config.data, config.test_data, config.test_rows, session.say
    )
    return (
        usable_comparisons(session, rows, config.max_length, "to learn"),
        usable_comparisons(session, test, config.max_length, "held out"),
    )


def run_preference(
    session: Session,
    config: PreferenceConfig,
    directory: Path,
    rows: Sequence[Comparison],
    test: Sequence[Comparison],
    *,
    stage: str = "preference",
) -> Weights:
    """Stage 2: a preference model, trained from the base."""
    setup = session.setup
    kept = session.config_of("preference", config)
    with open_run(
        session, directory, stage, kept, steps=config.steps(len(rows)), save_every_steps=config.save_every_steps
    ) as run:
        if not run.is_done:
            trainer = session.engine.trainer(lora=setup.adapter, seed=setup.seed)
            shown = session.comparisons(config.max_length)
            preference_model(config, rows, test, shown, trainer=trainer, run=run, seed=setup.seed)
        return run.final_weights


def run_rl(
    session: Session,
    config: RLConfig,
    directory: Path,
    *,
    init: Weights | None,
    judge: Judge,
    evaluate: Callable[[Sampler], Mapping[str, float]],
    origin: Mapping[str, str],
) -> Weights:
    """Stage 3: reinforcement learning from `init` (None: the base), which is also the reference."""
    setup = session.setup
    loaded = data.load_prompts(config.data, skip_bad_rows=setup.skip_bad_rows)
    session.say(loaded.describe())
    prompts: list[Conversation] = usable_prompts(
        session, loaded.rows, max_prompt_length=config.max_prompt_length, max_tokens=config.max_tokens
    )
    kept = session.config_of("rl", config, **origin)
    with open_run(session, directory, "rl", kept, steps=config.steps, save_every_steps=config.save_every_steps) as run:
        if not run.is_done:
            trainer = session.engine.trainer(init=init, lora=setup.adapter, seed=setup.seed)
            reference = session.engine.sampler(init)
            policy_gradient(
                config, prompts, session.renderer, judge, reference,
                trainer=trainer, run=run, evaluate=evaluate, seed=setup.seed,
            )  # fmt: skip
        return run.final_weights
