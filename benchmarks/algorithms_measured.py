"""What needs the model: the rows that all algorithms learn, and what became of the policies on held-out prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from commands import record, taken

from tercet import data
from tercet.algorithms.preference_model import AGREEMENT_FILE
from tercet.config import load, to_mapping
from tercet.errors import UsageError
from tercet.recipes.evaluate import Arena
from tercet.recipes.ppo import Alone, Scoreboard
from tercet.recipes.reward_source import RewardSourceConfig, reward_of
from tercet.recipes.rlhf import RLHFConfig
from tercet.recipes.rows import Question, load_pairs, prompts_to_learn, questions, rows_sha256
from tercet.recipes.session import Session, SetupConfig, open_session, settings_of
from tercet.recipes.trained import either_judge_at, judge_at, weights_at
from tercet.rewards.judge import Compares
from tercet.runs.durable import write_atomically
from tercet.runs.rows import read_rows
from tercet.types import Comparison, Weights, as_messages

COMMON_FILE = "common.json"


def known(out: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `prepare` has written before, if it was asked the same."""
    file = out / COMMON_FILE
    found = json.loads(file.read_text()) if file.exists() else {}
    return dict(found["common"]) if found.get("asked") == json.loads(json.dumps(asked)) else None


def prepare(run: Path, out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Write what all algorithms learn from and are tested on; returns what their settings have in common.

    The comparisons are those that the run's preference model learned: its second judge's are left out.

    Raises:
        UsageError: The data are no longer those of the run, so they may hold what the second judge learned.
    """
    config = load(RLHFConfig, run / "config.yaml")
    session = open_session(config, _say)
    rows, test = load_pairs(session, config.preference)
    learned, _ = data.hold_out(rows, fraction=config.held_out_judge, seed=config.seed)
    began = yaml.safe_load((run / "preference/origin.yaml").read_text())["rows_sha256"]
    if rows_sha256(learned) != began:
        raise UsageError(
            f"{config.preference.data} no longer gives the comparisons that {run}/preference learned, so its held-out "
            "judge may know some of what it gives; name a --run that is made from these data"
        )
    answered = _arena(session, config, asked["prompts"], test, {}).questions
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("comparisons", learned), ("test", test)):
        write_atomically(folder / f"{name}.jsonl", _lines(_pair(row) for row in pairs if row.label in ("A", "B")))
    to_learn = prompts_to_learn(session, config.rl, questions(test))
    for name, part in (("prompts", to_learn), ("test-prompts", [each.prompt for each in answered])):
        write_atomically(folder / f"{name}.jsonl", _lines({"prompt": as_messages(each)} for each in part))
    setup = settings_of(SetupConfig, config)
    write_atomically(out / "setup.yaml", yaml.safe_dump(setup, sort_keys=False))
    learns = {**to_mapping(config.rl), "data": str(folder / "prompts.jsonl")}
    write_atomically(out / "policy_gradient.yaml", yaml.safe_dump(learns, sort_keys=False))
    common = {
        "max_tokens": config.evaluation.max_tokens,
        "temperature": config.evaluation.temperature,
        "few": min(config.evaluation.prompts_while_training, len(answered)),
        "test_rows": config.preference.test_rows,
    }
    write_atomically(out / COMMON_FILE, json.dumps({"asked": asked, "common": common}, indent=1) + "\n")
    return common


def compare(run: Path, out: Path, prompts: int, done: Sequence[str]) -> dict[str, Any]:
    """Everything `algorithms.json` says; rows of the same policy on the same prompts are taken from it."""
    config = load(RLHFConfig, run / "config.yaml")
    session = open_session(config, _say)
    _, test = load_pairs(session, config.preference)
    judges: dict[str, Compares] = {
        "preference": judge_at(session, str(run / "preference")),
        "held_out": either_judge_at(session, str(run / "judge"), what="judge"),
    }
    arena = _arena(session, config, prompts, test, judges)
    start = weights_at(str(run / "sft"), "policy")
    models = {"sft": run / "sft", "preference": run / "preference", "held_out": run / "judge"}
    reward = None
    if "reward" in done:
        models["reward"] = out / "reward"
        reward = Alone(reward_of(session, RewardSourceConfig(model=str(out / "reward"))), {})
    header = {
        "model": config.model,
        "seed": config.seed,
        "prompts": len(arena.questions),
        "prompts_sha256": rows_sha256(each.prompt for each in arena.questions),
        "max_tokens": arena.config.max_tokens,
        "temperature": arena.config.temperature,
        "models": {name: session.fingerprint(weights_at(str(place), name)) for name, place in models.items()},
    }
    rows = _kept(out / "algorithms.json", header)
    board = Scoreboard(arena, reward, start)
    for name in ("sft", *(name for name in done if name != "reward")):
        folder = run / "sft" if name == "sft" else _last(out / name)
        weights = weights_at(str(folder), "policy")
        policy = session.fingerprint(weights)
        if rows.get(name, {}).get("policy_sha256") != policy:
            rows[name] = {"policy_sha256": policy, **_measured(board, name, weights)}
        kept = record(name, out)
        rows[name] |= {"folder": str(folder), **taken(name, out), "command": kept and kept["command"]}
    for row in rows.values() if reward is not None else ():
        row["score_gain"] = (row["score"] - rows["sft"]["score"]) / rows["sft"]["score_std"]
    return {
        **header,
        **_machine(),
        "judges": {
            name: _agreement(place) | (taken("reward", out) if name == "reward" else {})
            for name, place in models.items()
            if name != "sft"
        },
        "questions": [as_messages(each.prompt) for each in arena.questions],
        "algorithms": rows,
        "ppo": _ppo(out / "ppo") if "ppo" in done else None,
    }


def _arena(
    session: Session, config: RLHFConfig, prompts: int, test: Iterable[Comparison], judges: Mapping[str, Compares]
) -> Arena:
    asked: list[Question] = questions(test)
    return Arena(session, replace(config.evaluation, prompts=prompts, against_chosen=0), asked, judges)


def _last(folder: Path) -> Path:
    """Where a command left its policy: REBEL's lies in the folder of the last iteration."""
    iterations = sorted(folder.glob("iteration-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [folder, *iterations][-1]


def _measured(board: Scoreboard, name: str, weights: Weights | None) -> dict[str, Any]:
    """A policy's answers, and what judges and the reward model make of them."""
    arena = board.arena
    _say(f"evaluation: {name} answers {len(arena.questions)} held-out prompts")
    policies = {"sft": board.start, name: arena.session.engine.sampler(weights)}
    found = arena.report(policies, start="sft")
    return {
        "win_rates": {
            row["judge"]: {key: row[key] for key in ("win_rate", "stderr", "low", "high", "n", "mean_margin")}
            for row in found["win_rates"]
        },
        **found["policies"][name],
        **board.scores(arena.answers(policies[name], len(arena.questions))),
        "answers": [each["answers"][name] for each in found["samples"]],
    }


def _kept(file: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that were measured before by the same judges on the same prompts."""
    before = json.loads(file.read_text()) if file.exists() else {}
    same = all(before.get(name) == value for name, value in header.items())
    return dict(before["algorithms"]) if same else {}


def _ppo(folder: Path) -> dict[str, Any]:
    """How far PPO's controller let the policy go, step by step."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "objective/kl" in row]
    kl = [row["objective/kl"] for row in rows]
    return {
        "target": yaml.safe_load((folder / "config.yaml").read_text())["target"],
        "kl": kl,
        "kl_coef": [row["objective/kl_coef"] for row in rows],
        "mean_scores": [row["ppo/mean_scores"] for row in rows],
        "kl_max": max(kl),
    }


def _agreement(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / AGREEMENT_FILE).read_text())
    return {"accuracy": found["accuracy_both"], "comparisons": found["n"]}


def _machine() -> dict[str, Any]:
    import torch
    from measuring import versions
    from record import machine, today

    return {"machine": machine(torch.get_num_threads()), "versions": versions(), "measured": today()}


def _pair(row: Comparison) -> dict[str, Any]:
    sides = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return {**{name: as_messages(turns) for name, turns in sides.items()}, "margin": row.margin}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
