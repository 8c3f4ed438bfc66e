"""The whole road: supervised fine-tuning, preference model, reinforcement learning, and proof that it helped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from tercet import data
from tercet.algorithms.policy_gradient import RLConfig
from tercet.algorithms.ppo import PPOConfig
from tercet.algorithms.preference_model import AGREEMENT_FILE, PreferenceConfig
from tercet.algorithms.reward_model import RewardModelConfig
from tercet.algorithms.sft import SFTConfig
from tercet.config import to_mapping
from tercet.errors import ConfigError
from tercet.recipes.evaluate import Arena, EvaluationConfig
from tercet.recipes.ppo import run_ppo
from tercet.recipes.reward import run_reward
from tercet.recipes.reward_source import RewardSourceConfig, reward_of
from tercet.recipes.rl import origin, write_evaluation
from tercet.recipes.rows import load_pairs, prompts_to_learn, questions
from tercet.recipes.session import FREE, Say, SetupConfig, decided_here, open_session
from tercet.recipes.stages import run_preference, run_rl, run_sft
from tercet.rewards.judge import Compares
from tercet.runs.settings import keep_config
from tercet.types import Comparison, Weights


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How the policy learns."""

    algorithm: Literal["policy_gradient", "ppo"] = "policy_gradient"
    """policy_gradient: from tournaments of a preference model (`preference`, `rl`); ppo: from the scores of a scalar
    reward model, with a critic (`reward`, `ppo`). The second judge is then of the other kind."""


@dataclass(frozen=True, kw_only=True)
class RLHFConfig(SetupConfig):
    """All three stages on one base model."""

    out: str = "runs/rlhf"
    """Folder of the run; the same command goes on where it stood."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Stage 1."""
    preference: PreferenceConfig = field(default_factory=lambda: PreferenceConfig(max_steps=64))
    """Stage 2. Of the built-in comparisons 64 steps are enough; set max_steps to null to learn all of a larger set."""
    preference_from: Literal["sft", "base"] = "sft"
    """What the preference model is trained from; the policy of stage 1 learns to compare sooner than the base."""
    held_out_judge: float = 0.25
    """Share of the comparisons that only a second judge learns, which watches RL and is never optimised; 0 has none."""
    judge: RewardModelConfig = field(default_factory=lambda: RewardModelConfig(max_steps=12))
    """The second judge: a scalar reward model, so that it differs in kind as well. Its comparisons are stage 2's."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """How the policy learns in stage 3, and so from what."""
    rl: RLConfig = field(default_factory=RLConfig)
    """Stage 3."""
    reward: RewardModelConfig = field(default_factory=lambda: RewardModelConfig(max_steps=40))
    """Stage 2 with policy.algorithm ppo; its comparisons are those of `preference`."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Stage 3 with policy.algorithm ppo."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How policies are compared."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The figures of the published recipe (tinker-cookbook, preference/rlhf), for real hardware.
        "no-robots-hhh": {
            "lora": {"rank": 64, "alpha": 32.0},
            "renderer": "role_colon",
            "sft": {"data": "HuggingFaceH4/no_robots", "batch_size": 256, "learning_rate": 2e-4, "max_length": 16384,
                    "max_grad_norm": None, "eval_every_steps": 20, "save_every_steps": 100, "test_rows": 256},
            "preference": {"data": "Anthropic/hh-rlhf", "pairs_per_step": 128, "learning_rate": 3e-4,
                           "max_length": 16384, "max_grad_norm": None, "test_rows": 1024, "save_every_steps": 100,
                           "warmup_steps": 0, "max_steps": None, "eval_every_steps": 100,
                           "label_weight": 1.0},
            "preference_from": "base",
            "judge": {"pairs_per_step": 128, "max_length": 16384, "max_steps": None},
            "rl": {"data": "Anthropic/hh-rlhf", "prompts_per_step": 256, "group_size": 4, "max_tokens": 1024,
                   "learning_rate": 1e-5, "schedule": "constant", "max_grad_norm": None, "max_prompt_length": 15360,
                   "steps": 100, "judge": "hard", "eval_every_steps": 20, "save_every_steps": 20},
            "evaluation": {"prompts": 256, "prompts_while_training": 256, "against_chosen": 256, "max_tokens": 1024},
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_judge < 1:
            raise ConfigError(f"held_out_judge is {self.held_out_judge}; it is a share, from 0 to below 1")
        if self.engine == "tinker" and (self.held_out_judge or self.policy.algorithm == "ppo"):
            raise ConfigError(
                "a Tinker service has no heads, so no scalar reward model and no critic: with engine tinker set "
                f"held_out_judge 0 and policy.algorithm policy_gradient; they are {self.held_out_judge:g} and "
                f"{self.policy.algorithm}"
            )
        if self.engine == "tinker" and {self.rl.temperature, self.evaluation.temperature} != {1.0}:
            raise ConfigError(
                "a Tinker service scores and learns at temperature 1: with engine tinker, rl.temperature and "
                f"evaluation.temperature must be 1; they are {self.rl.temperature:g} and "
                f"{self.evaluation.temperature:g}"
            )


def rlhf(config: RLHFConfig, *, say: Say = print) -> Path:
    """Run every stage that is not done yet, then compare the policies in `evaluation.json`.

    Returns:
        The run's folder.
    """
    root = Path(config.out)
    root.mkdir(parents=True, exist_ok=True)
    keep_config(root / "config.yaml", to_mapping(config), may_differ=FREE | decided_here(config))
    session = open_session(config, say)
    limit = config.preference.max_length
    learns = config.ppo if config.policy.algorithm == "ppo" else config.rl
    session.check_room(limit=limit, answer_tokens=max(learns.max_tokens, config.evaluation.max_tokens))
    start = run_sft(session, config.sft, root / "sft")
    rows, test = load_pairs(session, config.preference)
    aside: list[Comparison] = []
    if config.held_out_judge:
        rows, aside = data.hold_out(rows, fraction=config.held_out_judge, seed=config.seed)
    before = start if config.preference_from == "sft" else None
    # The two judges differ in kind, so that what one of them can be talked into the other need not believe.
    scalar, pairwise = ("preference", "judge") if config.policy.algorithm == "ppo" else ("judge", "preference")
    trained: dict[str, Weights] = {}
    judges: dict[str, Compares] = {}
    for stage, name, learned in (("preference", "preference", rows), ("judge", "held_out", aside)):
        if learned and stage == pairwise:
            trained[name] = run_preference(session, config.preference, root / stage, learned, test, init=before)
            # Win rates are counted in verdicts, whatever RL learns from.
            judges[name] = session.judge(session.engine.sampler(trained[name]), limit=limit)
        elif learned and stage == scalar:
            settings = replace(
                config.judge if stage == "judge" else config.reward,
                data=config.preference.data,
                test_data=config.preference.test_data,
            )
            trained[name] = run_reward(session, settings, root / stage, learned, test, init=before, stage=stage)
            judges[name] = session.scalar_judge(session.engine.scorer(trained[name]), limit=settings.max_length)
    arena = Arena(session, config.evaluation, questions(test), judges)
    first = session.engine.sampler(start)
    common: dict[str, Any] = {
        "init": start,
        "evaluate": lambda sampler, step: arena.measure(sampler, first, last=step == learns.steps),
        "origin": origin(session, start, trained["preference"]),
    }
    kept = {
        "policy": root / "sft",
        "test_data": config.preference.test_data or config.preference.data,
        "evaluation": config.evaluation,
        "out": root / "rl",
    }
    prompts = prompts_to_learn(session, learns, arena.questions)
    if config.policy.algorithm == "ppo":
        source = RewardSourceConfig(model=str(root / "preference"))
        policy = run_ppo(
            session,
            config.ppo,
            root / "rl",
            prompts,
            critic_init=trained["preference"],
            reward=reward_of(session, source),
            kept=session.config_of(PPOConfig, config.ppo, reward=source, **kept),
            stage="rl",
            **common,
        )
    else:
        policy = run_rl(
            session,
            config.rl,
            root / "rl",
            prompts,
            judge=session.judge(session.engine.sampler(trained["preference"]), limit=limit, verdict=config.rl.judge),
            kept=session.config_of(RLConfig, config.rl, judge_model=root / "preference", **kept),
            **common,
        )
    if not (root / "evaluation.json").exists():
        say(f"evaluation: base, SFT and RL policies answer {len(arena.questions)} held-out prompts, judges compare")
        policies = {"base": session.engine.sampler(), "sft": first, "rl": session.engine.sampler(policy)}
        found = arena.report(policies, start="sft")
        found["judges"] = {
            name: json.loads((root / stage / AGREEMENT_FILE).read_text())
            for name, stage in (("preference", "preference"), ("held_out", "judge"))
            if name in judges
        }
        write_evaluation(root, found)
    return root
