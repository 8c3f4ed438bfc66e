"""A run's report: one HTML file that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

import tercet
from tercet.runs import figures
from tercet.runs.durable import write_atomically
from tercet.runs.folder import RunFolder, Stage, read_folder
from tercet.runs.progress import format_duration, format_number
from tercet.runs.rows import Row

SHOWN_SAMPLES = 12
"""Prompts shown side by side; the first few are open."""

STAGE_TITLES = {
    "sft": ("Supervised fine-tuning", "Learns to answer as the demonstrations do."),
    "preference": (
        "Preference model",
        "Learns which of two answers people like better; it is the judge RL trains against.",
    ),
    "judge": ("Held-out judge", "Learned from other comparisons; it watches RL and is never optimised against."),
    "rl": ("Reinforcement learning", "Answers meet in tournaments, and what wins becomes likelier."),
}


@dataclass(frozen=True)
class Card:
    """One number of the headline."""

    label: str
    value: str
    detail: str = ""
    interval: tuple[float, float, float] | None = None
    """Low, value and high, shares from 0 to 1, drawn as a bar with 0.5 marked."""


def write_report(root: Path) -> Path:
    """Read a pipeline's folder, or a single stage's, and write `report.html` there; what is missing is left out.

    Everything is in the one file: style, figures, text. What comes from data is escaped.

    Raises:
        UsageError: There is no run in `root`.
        CheckpointError: A file of rows is damaged.
    """
    folder = read_folder(root)
    template = files("tercet.runs").joinpath("report.html").read_text()
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    html = page.from_string(template).render(
        title=folder.root.resolve().name,
        model=folder.model,
        verdict=verdict(folder),
        cards=list(headline(folder)),
        hero=figures.win_rate_over_steps(folder.stages["rl"]) if "rl" in folder.stages else None,
        win_rates=[_win_rate_row(row) for row in folder.evaluation.get("win_rates", [])],
        checks=list(_checks(folder)),
        judges=[_judge_row(name, judge) for name, judge in folder.evaluation.get("judges", {}).items()],
        policies=[_policy_row(name, policy) for name, policy in folder.evaluation.get("policies", {}).items()],
        stages=[_stage(stage) for stage in folder.stages.values()],
        samples=folder.evaluation.get("samples", [])[:SHOWN_SAMPLES],
        group=_last_group(folder.stages["rl"].samples) if "rl" in folder.stages else None,
        configs=list(_configs(folder)),
        environment=list(_environment(folder.environment)),
        is_long=_is_long,
        version=tercet.__version__,
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = root / "report.html"
    write_atomically(path, html)
    return path


def verdict(folder: RunFolder) -> str:
    """The run in one sentence, as far as the numbers carry it."""
    rate = folder.win_rate("preference")
    if rate is None or "low" not in rate or "high" not in rate:
        names = [STAGE_TITLES.get(name, (name, ""))[0].lower() for name in folder.stages]
        return f"{' and '.join(names)}: not yet compared with a policy it started from".capitalize()
    held_out = folder.win_rate("held_out")
    watched = ""
    if held_out is not None and "low" in held_out and "high" in held_out:
        apart = abs(_clearly(held_out) - _clearly(rate))
        says = ("agrees", "is not so sure" if _clearly(rate) else "sees one", "disagrees")[apart]
        watched = f"; the held-out judge {says} ({_percent(held_out['win_rate'])})"
    start = "the SFT policy" if "sft" in folder.stages else "the policy it started from"
    if _clearly(rate) == 0:
        return f"No clear difference: the RL policy wins {_percent(rate['win_rate'])} against {start}{watched}"
    better = "better" if _clearly(rate) > 0 else "worse"
    return f"RL made it {better}: {_percent(rate['win_rate'])} of answers win against {start}{watched}"


def headline(folder: RunFolder) -> Iterator[Card]:
    """The numbers at the top of the report, as many of them as there are."""
    for judge in ("preference", "held_out"):
        rate = folder.win_rate(judge)
        if rate is not None:
            bounds = (rate["low"], rate["win_rate"], rate["high"]) if "low" in rate and "high" in rate else None
            detail = f"95% interval {_percent(rate['low'])} to {_percent(rate['high'])}" if bounds else ""
            if "n" in rate:
                detail += f", {rate['n']:.0f} prompts"
            before = "SFT" if "sft" in folder.stages else "its start"
            label = f"RL wins against {before}, {figures.judge_label(judge)}"
            yield Card(label, _percent(rate["win_rate"]), detail, bounds)
    judge = folder.evaluation.get("judges", {}).get("preference", {})
    preference = folder.stages.get("preference")
    both, single, flips = (
        judge.get(key, preference.last(f"test/{key}") if preference else None)
        for key in ("accuracy_both", "accuracy", "flip_rate")
    )
    if both is not None and single is not None:
        detail = f"both orders averaged; {_percent(single)} of single verdicts"
        detail += "" if flips is None else f", {_percent(flips)} of pairs flip with the order"
        yield Card("Preference accuracy, held-out comparisons", _percent(both), detail)
    sft = folder.stages.get("sft")
    start, end = (sft.first("test/nll"), sft.last("test/nll")) if sft else (None, None)
    if start is not None and end is not None:
        detail = f"nats per token, {'down' if end <= start else 'up'} by {abs(end - start):.3f}"
        yield Card("Held-out NLL, start to end of SFT", f"{start:.3f} → {end:.3f}", detail)
    times = [stage.elapsed_s for stage in folder.stages.values() if stage.elapsed_s is not None]
    if times:
        done = sum(stage.is_done for stage in folder.stages.values())
        yield Card(
            "Wall time, all stages", format_duration(sum(times)), f"{done} of {len(folder.stages)} stages finished"
        )


def _clearly(rate: dict[str, float]) -> int:
    """1 when the whole interval is above one half, -1 when below, else 0."""
    return (rate["low"] > 0.5) - (rate["high"] < 0.5)


def _checks(folder: RunFolder) -> Iterator[str]:
    """Figures that show whether a better reward means better answers."""
    rl = folder.stages.get("rl")
    if rl is not None:
        yield from figures.against_kl(rl)
        length = figures.against_length(rl.samples)
        if length:
            yield length
    calibration = figures.reliability(folder.evaluation.get("judges", {}))
    if calibration:
        yield calibration


def _stage(stage: Stage) -> dict[str, object]:
    title, purpose = STAGE_TITLES.get(stage.name, (stage.name, ""))
    state = "finished" if stage.is_done else "not finished"
    took = "" if stage.elapsed_s is None else f", {format_duration(stage.elapsed_s)}"
    return {
        "title": title,
        "purpose": purpose,
        "facts": f"{stage.steps} steps{took}, {state}",
        "figures": figures.stage_figures(stage),
    }


def _win_rate_row(row: Row) -> list[str]:
    interval = f"{_percent(row.get('low'))} to {_percent(row.get('high'))}"
    against = f"{_policy_label(row['policy'])} against {_policy_label(row['against'])}"
    return [against, figures.judge_label(row["judge"]), _percent(row["win_rate"]), interval, _number(row.get("n"))]


def _judge_row(name: str, judge: Row) -> list[str]:
    shares = ("accuracy_both", "accuracy", "accuracy_short_chosen", "accuracy_long_chosen", "flip_rate")
    figures_of = [_percent(judge.get(key)) for key in shares] + [_fixed(judge.get(key), 3) for key in ("ece", "nll")]
    return [figures.judge_label(name), *figures_of, _number(judge.get("n"))]


def _policy_row(name: str, policy: Row) -> list[str]:
    length, clipped = _fixed(policy.get("mean_length"), 1), _percent(policy.get("clipped_ratio"))
    return [_policy_label(name), length, clipped, _fixed(policy.get("entropy"), 2), _fixed(policy.get("kl"), 2)]


def _policy_label(name: str) -> str:
    return {"rl": "RL", "sft": "SFT", "start": "its start", "chosen": "chosen answers"}.get(name, name)


def _last_group(samples: list[Row]) -> dict[str, Any] | None:
    """The last group that was sampled: a prompt, and its answers from best to worst."""
    if not samples:
        return None
    last = samples[-1]
    rows = [row for row in samples if (row["step"], row.get("group")) == (last["step"], last.get("group"))]
    rows.sort(key=lambda row: -(row.get("reward") or 0.0))
    answers = [
        {
            "text": row["completion"],
            "facts": f"reward {_fixed(row.get('reward'), 2)}, advantage {_fixed(row.get('advantage'), 2)}, "
            f"{_number(row.get('tokens'))} tokens, ended by {row.get('stop_reason', '?')}",
        }
        for row in rows
    ]
    return {"step": last["step"], "prompt": last.get("prompt", []), "answers": answers}


def _is_long(prompt: list[dict[str, str]]) -> bool:
    """Whether a prompt does not fit the one line of its heading."""
    return len(prompt) > 1 or any(len(message["content"]) > 110 or "\n" in message["content"] for message in prompt)


def _configs(folder: RunFolder) -> Iterator[tuple[str, str]]:
    if folder.config:
        yield "config.yaml", folder.config
    for stage in folder.stages.values():
        if stage.config:
            yield stage.directory.relative_to(folder.root).joinpath("config.yaml").as_posix(), stage.config


def _environment(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    labels = {
        "tercet": "tercet", "python": "Python", "system": "System", "cpu": "CPU", "cpus": "CPUs usable",
        "cores": "Cores", "memory_gib": "Memory (GiB)", "torch_threads": "torch threads", "gpus": "GPUs",
    }  # fmt: skip
    for key, label in labels.items():
        value = facts.get(key)
        if value is not None:
            yield label, (", ".join(value) or "none") if isinstance(value, list) else format_plain(value)
    for key, label in (("libraries", "Libraries"), ("variables", "Variables")):
        pairs = facts.get(key) or {}
        if pairs:
            yield label, ", ".join(f"{name} {version}" for name, version in pairs.items())


def format_plain(value: object) -> str:
    """A number without a needless fraction, anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f}%"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else format_number(value)


def _fixed(value: float | None, decimals: int) -> str:
    """So many decimals; what rounds to zero has no sign."""
    return "-" if value is None or not math.isfinite(value) else f"{round(value, decimals) + 0.0:.{decimals}f}"
