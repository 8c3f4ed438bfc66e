"""The order of rows, and which are held out, follow from the arguments alone."""

from __future__ import annotations

import pytest

from tercet.data import hold_out, index_at, order
from tercet.errors import ConfigError, DataError
from tercet.types import Comparison, LabelledAnswer, Message


def pair(asked: str, answer: str) -> Comparison:
    return Comparison((Message("user", asked),), (Message("assistant", answer),), (Message("assistant", "No."),), "A")


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_an_epoch_shows_every_row_once(n: int) -> None:
    assert sorted(order(n, seed=3, epoch=5)) == list(range(n))


def test_order_stays_what_it_was_in_every_release() -> None:
    # A run begun with an older release and resumed with this one must see the same rows.
    assert order(8, seed=0, epoch=0) == [2, 4, 7, 5, 0, 6, 3, 1]
    assert order(8, seed=0, epoch=1) == [3, 1, 7, 4, 5, 0, 2, 6]


def test_another_seed_or_epoch_is_another_order() -> None:
    orders = {tuple(order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_positions_run_through_epoch_after_epoch() -> None:
    shown = [index_at(position, 5, seed=2) for position in range(15)]
    assert shown == [*order(5, seed=2, epoch=0), *order(5, seed=2, epoch=1), *order(5, seed=2, epoch=2)]


def test_positions_may_be_asked_for_in_any_order() -> None:
    backwards = [index_at(position, 5, seed=2) for position in reversed(range(500))]
    assert backwards[::-1] == [index_at(position, 5, seed=2) for position in range(500)]


def test_changing_an_order_that_was_given_out_changes_no_other() -> None:
    order(4, seed=0, epoch=0).clear()
    assert len(order(4, seed=0, epoch=0)) == 4


@pytest.mark.parametrize("arguments", [(-1, 5, 0), (0, 0, 0), (0, 5, -1)])
def test_a_position_a_length_or_a_seed_below_its_bounds_is_refused(arguments: tuple[int, int, int]) -> None:
    position, n, seed = arguments
    with pytest.raises(ConfigError):
        index_at(position, n, seed=seed)


def test_rows_held_out_and_kept_are_all_rows_in_their_order() -> None:
    kept, held = hold_out(list(range(100)), fraction=0.2, seed=1)
    assert len(held) == 20
    assert sorted(kept + held) == list(range(100))
    assert kept == sorted(kept) and held == sorted(held)
    assert hold_out(list(range(100)), count=20, seed=1) == (kept, held)
    assert hold_out(list(range(100)), count=20, seed=2)[1] != held


def test_no_prompt_is_both_kept_and_held_out() -> None:
    rows = [pair(f"Question {i // 3}", f"Answer {i}") for i in range(60)]
    kept, held = hold_out(rows, count=20, seed=0)
    assert len(held) == 18  # groups of three
    assert not {row.prompt for row in kept} & {row.prompt for row in held}


def test_good_and_bad_answers_to_a_prompt_are_on_one_side() -> None:
    rows = [
        LabelledAnswer((Message("user", f"Question {i // 2}"),), (Message("assistant", f"{i}"),), i % 2 == 0)
        for i in range(40)
    ]
    kept, held = hold_out(rows, count=11, seed=0)
    assert len(held) == 10  # groups of two
    assert not {row.prompt for row in kept} & {row.prompt for row in held}


def test_conversations_that_go_on_differently_are_on_one_side() -> None:
    rows = [(Message("user", f"Question {i // 2}"), Message("assistant", f"Answer {i}")) for i in range(20)]
    kept, held = hold_out(rows, count=4, seed=0)
    assert len(held) == 4 and not {row[0] for row in kept} & {row[0] for row in held}


def test_where_every_group_is_too_large_the_smallest_is_held_out() -> None:
    rows = [pair(asked, str(i)) for asked, times in (("a", 5), ("b", 3), ("c", 4)) for i in range(times)]
    for seed in range(4):
        assert {row.prompt[0].content for row in hold_out(rows, count=2, seed=seed)[1]} == {"b"}


def test_nothing_is_held_out_when_none_is_asked_for() -> None:
    assert hold_out([1, 2], count=0, seed=0) == ([1, 2], [])


def test_holding_out_everything_or_in_two_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one must be kept"):
        hold_out([1, 2], count=2, seed=0)
    with pytest.raises(ConfigError, match="exactly one"):
        hold_out([1, 2], count=1, fraction=0.5, seed=0)
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        hold_out([1, 2], fraction=1.0, seed=0)


def test_rows_that_all_begin_alike_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="1 of 4 rows cannot be held out: all 4 begin alike"):
        hold_out([pair("Hi", str(i)) for i in range(4)], count=1, seed=0)
