"""Figures of the report, as SVG that takes its colours from the page: readable in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tercet.runs.folder import WIN_RATE_KEYS, Stage
from tercet.runs.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand for the page's: matplotlib writes them into the SVG, and `_svg` puts the page's in their place.
INK, LINE, BLUE, ORANGE, GREEN = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAGE_COLOURS = {
    INK: "var(--muted)", LINE: "var(--line)", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREEN: "var(--green)",
}  # fmt: skip

MOST_POINTS = 1200
"""Points in a scatter; of more, every so many-th is drawn."""

MOST_MARKERS = 30
"""Points of a curve that are marked one by one; a longer curve is a bare line."""


@dataclass(frozen=True)
class Curve:
    """One metric of a panel. `train` says that it is noisy: drawn thin, with the mean over a tenth of the run."""

    key: str
    label: str
    colour: str = BLUE
    train: bool = False


@dataclass(frozen=True)
class Panel:
    """One small figure of a stage: metrics of one unit over steps."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: float | None = None
    """A value worth comparing with, drawn as a dashed line: chance, for instance."""


_ACCURACY = Panel(
    "Accuracy",
    "share of comparisons",
    (
        Curve("accuracy", "training", LINE, train=True),
        Curve("test/accuracy_both", "held out, both orders averaged"),
        Curve("test/accuracy", "held out, single verdicts", INK),
        Curve("test/accuracy_short_chosen", "held out, shorter is better", ORANGE),
        Curve("test/accuracy_long_chosen", "held out, longer is better", GREEN),
    ),
    level=0.5,
)
_JUDGE_PANELS = (
    Panel(
        "Negative log-likelihood of the label",
        "nats per comparison",
        (Curve("loss", "training", LINE, train=True), Curve("test/nll", "held out")),
        level=math.log(2),
    ),
    _ACCURACY,
    Panel(
        "Flip rate and calibration error",
        "share of comparisons",
        (
            Curve("test/flip_rate", "verdict flips with the order"),
            Curve("test/ece", "expected calibration error", ORANGE),
        ),
    ),
    Panel("Gradient norm", "norm", (Curve("grad_norm", "gradient", train=True),)),
)
PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        Panel(
            "Negative log-likelihood",
            "nats per token",
            (Curve("train_mean_nll", "training", LINE, train=True), Curve("test/nll", "held out")),
        ),
        Panel("Held-out bits per byte", "bits per byte", (Curve("test/bpb", "held out"),)),
        Panel("Gradient norm", "norm", (Curve("grad_norm", "gradient", train=True),)),
        Panel("Learning rate", "AdamW step size", (Curve("learning_rate", "learning rate"),)),
    ),
    "preference": _JUDGE_PANELS,
    "judge": _JUDGE_PANELS,
    "rl": (
        Panel(
            "Reward",
            "points",
            (
                Curve("reward", "mean of the batch", train=True),
                Curve("reward_std", "spread within a group", ORANGE, train=True),
            ),
        ),
        Panel("KL to the starting policy", "nats per answer", (Curve("kl", "KL", train=True),), level=0.0),
        Panel("Entropy", "nats per token", (Curve("entropy", "policy", train=True),)),
        Panel(
            "Length of answers",
            "tokens",
            (
                Curve("completions/mean_length", "all", train=True),
                Curve("completions/mean_terminated_length", "finished", ORANGE, train=True),
            ),
        ),
        Panel(
            "Answers and groups that went wrong",
            "share",
            (
                Curve("completions/clipped_ratio", "answers cut at the limit", train=True),
                Curve("frac_reward_zero_std", "groups without a difference", ORANGE, train=True),
            ),
        ),
        Panel(
            "Is the judge fooled?",
            "share, or correlation",
            (
                Curve("judge/flip_rate", "verdict flips with the order", train=True),
                Curve("reward_length_correlation", "reward and length (correlation)", ORANGE, train=True),
            ),
            level=0.0,
        ),
        Panel("Gradient norm", "norm", (Curve("grad_norm", "gradient", train=True),)),
        Panel(
            "Sampler against trainer",
            "nats per token",
            (
                Curve("kl_sample_train_v1", "estimate 1", train=True),
                Curve("kl_sample_train_v2", "estimate 2", ORANGE, train=True),
            ),
            level=0.0,
        ),
    ),
}  # fmt: skip
"""What is drawn of each stage."""


def stage_figures(stage: Stage) -> list[str]:
    """The panels of a stage that have something to show. A stage without panels of its own shows each metric."""
    panels = PANELS.get(stage.name) or [
        Panel(key, "", (Curve(key, key, train=True),))
        for key in dict.fromkeys(key for row in stage.metrics for key in row if key != "step")
    ]
    return [figure for panel in panels if (figure := _draw_panel(panel, stage))]


def win_rate_over_steps(stage: Stage) -> str | None:
    """Win rate against the starting policy over steps, with its 95% interval, under each judge."""
    figure, axes = _figure(10.0, 3.7)
    drawn = False
    judges = (("preference", "training judge", BLUE), ("held_out", "held-out judge", ORANGE))
    for judge, label, colour in judges:
        key = WIN_RATE_KEYS[judge]
        steps, values = stage.series(key)
        if not steps:
            continue
        drawn = True
        axes.plot(steps, values, color=colour, marker="o", markersize=4, label=label)
        low, high = stage.series(f"{key}_low")[1], stage.series(f"{key}_high")[1]
        if len(low) == len(high) == len(steps):
            axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.vlines(steps, low, high, color=colour, alpha=0.5, linewidth=1)
    if not drawn:
        return None
    axes.axhline(0.5, color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    axes.set_ylim(0, 1)
    _steps_on_x(axes, stage)
    axes.set_ylabel("win rate (share of prompts)")
    return _svg(figure, "Win rate against the starting policy over steps", legend=True)


def against_kl(stage: Stage) -> list[str]:
    """Reward, and win rate, of each step against the KL of that step; later steps are drawn stronger."""
    figures = []
    for key, label, marker in (
        ("test/win_rate", "win rate (share of prompts)", "D"), ("reward", "mean reward (points)", "o"),
    ):  # fmt: skip
        rows = [row for row in stage.metrics if _is_number(row.get("kl")) and _is_number(row.get(key))]
        if len(rows) < 2:
            continue
        figure, axes = _figure(4.9, 3.1)
        last = max(1, rows[-1]["step"])
        for row in rows:
            alpha = 0.25 + 0.75 * row["step"] / last
            axes.plot(row["kl"], row[key], marker, color=BLUE, alpha=alpha, markersize=5, markeredgewidth=0)
        axes.set_title(f"{'Win rate' if key != 'reward' else 'Reward'} against KL, each step")
        axes.set_xlabel("KL to the starting policy (nats per answer)")
        axes.set_ylabel(label)
        figures.append(_svg(figure, f"{label} against KL"))
    return figures


def against_length(samples: Sequence[Row]) -> str | None:
    """Reward of each sample against its length, with the mean of each tenth of the samples."""
    points = [
        (row["tokens"], row["reward"])
        for row in samples
        if _is_number(row.get("tokens")) and _is_number(row.get("reward"))
    ]
    if len(points) < 2:
        return None
    figure, axes = _figure(4.9, 3.1)
    drawn = points[:: math.ceil(len(points) / MOST_POINTS)]
    axes.plot(*zip(*drawn, strict=True), "o", color=BLUE, alpha=0.25, markersize=3, markeredgewidth=0)
    points.sort()
    tenths = [points[len(points) * i // 10 : len(points) * (i + 1) // 10] for i in range(10)]
    means = [(_mean([x for x, _ in tenth]), _mean([y for _, y in tenth])) for tenth in tenths if tenth]
    axes.plot(*zip(*means, strict=True), color=ORANGE, marker="o", markersize=4, label="mean of each tenth by length")
    axes.set_title("Reward against length, each sample")
    axes.set_xlabel("length of the answer (tokens)")
    axes.set_ylabel("reward (points)")
    return _svg(figure, "Reward against length", legend=True)


def reliability(judges: Mapping[str, Mapping[str, Any]]) -> str | None:
    """How often each judge is right when it says how sure it is; on the dashed line it is as right as it says."""
    figure, axes = _figure(4.9, 3.1)
    lowest, drawn = 0.5, False
    for (name, judge), colour in zip(judges.items(), (BLUE, ORANGE, GREEN), strict=False):
        points = [row for row in judge.get("calibration") or () if row.get("n") and _is_number(row.get("accuracy"))]
        if not points:
            continue
        drawn = True
        lowest = min(lowest, *(row["confidence"] for row in points))
        most = max(row["n"] for row in points)
        x, y = [row["confidence"] for row in points], [row["accuracy"] for row in points]
        axes.plot(x, y, color=colour, linewidth=1.2, label=judge_label(name))
        axes.scatter(x, y, s=[12 + 70 * row["n"] / most for row in points], color=colour, alpha=0.65, linewidth=0)
    if not drawn:
        return None
    start = 0.5 if lowest >= 0.5 else 0.0
    axes.plot([start, 1], [start, 1], color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    axes.set_title("Calibration, held-out comparisons")
    axes.set_xlabel("confidence (probability of the verdict)")
    axes.set_ylabel("accuracy (share right)")
    return _svg(figure, "Reliability diagram", legend=True)


def judge_label(name: str) -> str:
    """What a judge is called in the report."""
    return {"preference": "training judge", "held_out": "held-out judge"}.get(name, name)


def _draw_panel(panel: Panel, stage: Stage) -> str | None:
    curves = [curve for curve in panel.curves if any(math.isfinite(value) for value in stage.series(curve.key)[1])]
    if not curves:
        return None
    figure, axes = _figure(4.9, 2.9)
    for curve in curves:
        steps, values = stage.series(curve.key)
        if not curve.train or len(values) < 3:
            marker = "o" if len(values) <= MOST_MARKERS else ""
            axes.plot(steps, values, color=_visible(curve.colour), marker=marker, markersize=3.5, label=curve.label)
        elif len(values) < 40:
            axes.plot(steps, values, color=_visible(curve.colour), label=curve.label)
        else:
            axes.plot(steps, values, color=_visible(curve.colour), alpha=0.3, linewidth=0.8)
            axes.plot(steps, _running_mean(values, len(values) // 20), color=_visible(curve.colour), label=curve.label)
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    axes.set_title(panel.title)
    _steps_on_x(axes, stage)
    axes.set_ylabel(panel.unit)
    return _svg(figure, f"{stage.name}: {panel.title}", legend=len(curves) > 1)


def _steps_on_x(axes: Axes, stage: Stage) -> None:
    """The same steps in every figure of a stage, whatever was measured when."""
    from matplotlib.ticker import MaxNLocator

    last = max(row["step"] for row in stage.metrics)
    axes.set_xlim(-0.04 * last - 0.1, 1.04 * last + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("step")


def _visible(colour: str) -> str:
    return INK if colour == LINE else colour


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    means = []
    for middle in range(len(values)):
        near = [value for value in values[max(0, middle - reach) : middle + reach + 1] if math.isfinite(value)]
        means.append(_mean(near) if near else math.nan)
    return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # matplotlib takes a second to import, and its pyplot keeps figures alive in a global: neither is wanted here.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    axes.grid(color=LINE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _svg(figure: Figure, name: str, *, legend: bool = False) -> str:
    import matplotlib

    for axes in figure.axes:
        axes.yaxis.get_offset_text().set(color=INK, fontsize=8.5)
        axes.title.set(color=INK, fontsize=10, fontweight="bold")
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=INK, fontsize=9)
    if legend:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    out = io.StringIO()
    # The salt makes identifiers, by which a drawing refers to its parts, differ between the figures of a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{name}" viewBox="\1">', text)
    return re.sub("|".join(_PAGE_COLOURS), lambda match: _PAGE_COLOURS[match[0]], text)
