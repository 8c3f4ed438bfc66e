"""What `algorithms.json` says, as Markdown: policies side by side, judges, and the goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TITLES = {
    "sft": "SFT policy", "policy_gradient": "policy gradient", "ppo": "PPO", "rebel": "REBEL", "dpo": "DPO",
    "simpo": "SimPO",
}  # fmt: skip
JUDGES = {
    "preference": "preference model (pairwise)",
    "held_out": "held-out judge (scalar)",
    "reward": "reward model (scalar)",
}
WIN_RATE, SCORE_GAIN, MINUTES, ACCURACY = 0.60, 1.0, 15.0, 0.80


def tables(found: Mapping[str, Any]) -> str:
    """All tables, with a line that says what was asked."""
    machine = found["machine"]
    said = (
        f"{found['model']}, seed {found['seed']}, {found['prompts']} held-out prompts, answers of at most "
        f"{found['max_tokens']} tokens at temperature {found['temperature']:g}; {machine['cpu']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ''}; {found['measured']}"
    )
    rows = found["algorithms"]
    policies = table(
        ("", "win rate, preference model", "win rate, held-out judge", "score gain, std", "KL, nats", "tokens",
         "cut off", "entropy, nats", "minutes", "peak GiB"),
        [_policy(title, rows[name]) for name, title in TITLES.items() if name in rows],
    )  # fmt: skip
    judges = table(
        ("", "accuracy", "comparisons", "minutes", "peak GiB"),
        [
            (JUDGES[name], _percent(each["accuracy"]), str(each["comparisons"]), _number(each.get("minutes"), 1),
             _number(each.get("peak_gib"), 1))
            for name, each in found["judges"].items()
        ],
    )  # fmt: skip
    reached = table(
        ("", "found", "wanted", ""),
        [(what, f"{value:.2f}", wanted, "yes" if met else "no") for what, value, wanted, met in goals(found)],
    )
    return "\n".join(
        [said, "", policies, "", judges, *(("", reached) if "yes" in reached or "no" in reached else ()), ""]
    )


def goals(found: Mapping[str, Any]) -> Iterator[tuple[str, float, str, bool]]:
    """What was found, what was wanted, and whether it was reached, of what there is."""
    rows, reward, ppo = found["algorithms"], found["judges"].get("reward"), found["ppo"]
    for name in ("ppo", "rebel", "dpo", "simpo"):
        if name in rows:
            rate, minutes = rows[name]["win_rates"]["held_out"]["win_rate"], rows[name]["minutes"]
            yield f"{TITLES[name]}: win rate under the held-out judge", rate, f"> {WIN_RATE:.2f}", rate > WIN_RATE
            if minutes is not None:
                yield f"{TITLES[name]}: minutes", minutes, f"<= {MINUTES:g}", minutes <= MINUTES
    if ppo is not None:
        gain, bound = rows["ppo"]["score_gain"], 2 * ppo["target"]
        yield "PPO: score gain, std", gain, f"> {SCORE_GAIN:g}", gain > SCORE_GAIN
        yield "PPO: largest KL of a step, nats", ppo["kl_max"], f"<= {bound:g}", ppo["kl_max"] <= bound
    if reward is not None:
        accuracy = reward["accuracy"]
        yield "reward model: accuracy", accuracy, f">= {ACCURACY:.2f}", accuracy >= ACCURACY


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows))


def _policy(title: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    rates = row["win_rates"]
    return (
        title,
        *(_rate(rates.get(judge)) for judge in ("preference", "held_out")),
        _number(row.get("score_gain"), 2),
        _number(row["kl"], 2),
        _number(row["mean_length"], 1),
        _percent(row["clipped_ratio"]),
        _number(row["entropy"], 2),
        _number(row["minutes"], 1),
        _number(row["peak_gib"], 1),
    )


def _rate(rate: Mapping[str, float] | None) -> str:
    return "" if rate is None else f"{rate['win_rate']:.2f} ({rate['low']:.2f} to {rate['high']:.2f})"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
