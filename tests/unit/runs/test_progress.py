"""What a person sees while a run goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tercet.runs.progress import ProgressDisplay, format_number


def lines_of(total: int, *, seconds_per_step: float, every_s: float, first_step: int = 0) -> list[str]:
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=60)
    with ProgressDisplay(
        "rl", total_steps=total, first_step=first_step, console=console, every_s=every_s, clock=lambda: now[0]
    ) as display:
        for step in range(first_step, total):
            now[0] += seconds_per_step
            display.update(
                step, {"reward": 0.25, "kl": 1e-5} | ({"test/win_rate": 0.5 + step / 100} if step % 5 == 0 else {})
            )
    return out.getvalue().splitlines()


def test_without_a_terminal_the_first_and_the_last_step_and_a_few_between_get_a_line() -> None:
    lines = lines_of(20, seconds_per_step=2.0, every_s=10.0)
    assert [line.split("/")[0] for line in lines] == [f"rl  step {step}" for step in (1, 6, 11, 16, 20)]


def test_a_line_tells_stage_step_time_left_and_the_numbers_that_matter() -> None:
    first, *_, last = lines_of(100, seconds_per_step=2.0, every_s=10.0)
    assert first == "rl  step 1/100  3 min 18 s left  reward 0.25  win rate 0.5  kl 1e-05"
    assert last == "rl  step 100/100  done  reward 0.25  win rate 1.45  kl 1e-05"


def test_a_run_of_one_step_gets_one_line() -> None:
    assert len(lines_of(1, seconds_per_step=1.0, every_s=10.0)) == 1


def test_a_resumed_run_counts_from_where_it_stands_and_tells_the_time_left_by_its_own_pace() -> None:
    lines = lines_of(10, seconds_per_step=3.0, every_s=100.0, first_step=7)
    assert lines[0].startswith("rl  step 8/10  6 s left")


def test_in_a_terminal_one_live_line_is_drawn() -> None:
    out = io.StringIO()
    with ProgressDisplay("sft", total_steps=3, console=Console(file=out, force_terminal=True, width=100)) as display:
        for step in range(3):
            display.update(step, {"loss": 1.5})
    assert "step 3/3" in out.getvalue() and "loss 1.5" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.73125, "0.7312"), (12.3456, "12.35"), (1204, "1204"), (123456, "123456"), (3.14e-05, "3.1e-05"), (0, "0")],
)
def test_numbers_have_four_figures(value: float, text: str) -> None:
    assert format_number(value) == text
