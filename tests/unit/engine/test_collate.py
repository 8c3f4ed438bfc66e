from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.engine.collate import forest, micro_batches
from tercet.types import Batch, Datum

# Two or three different tokens make shared prefixes, prefixes of one another and duplicates common.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=9)
examples = settings(max_examples=150, deadline=None)


def prefixes(sequences):
    return {tuple(row[: t + 1]) for row in sequences for t in range(len(row))}


@examples
@given(SEQUENCES)
def test_every_path_gives_its_sequence_back(sequences):
    packed = forest(sequences)
    for path, sequence in zip(packed.paths, sequences, strict=True):
        assert packed.tokens[path].tolist() == sequence
        assert packed.positions[path].tolist() == list(range(len(sequence)))


@examples
@given(SEQUENCES)
def test_every_shared_prefix_is_there_exactly_once(sequences):
    packed = forest(sequences)
    assert len(packed.tokens) == len(packed.positions) == len(packed.subtree_end) == len(prefixes(sequences))
    places = {}
    for path, sequence in zip(packed.paths, sequences, strict=True):
        for t, place in enumerate(path.tolist()):
            assert places.setdefault(tuple(sequence[: t + 1]), place) == place
    assert sorted(places.values()) == list(range(len(packed.tokens)))


@examples
@given(SEQUENCES)
def test_one_number_per_token_says_who_sees_whom(sequences):
    packed = forest(sequences)
    text = [()] * len(packed.tokens)
    for path, sequence in zip(packed.paths, sequences, strict=True):
        for t, place in enumerate(path.tolist()):
            text[place] = tuple(sequence[: t + 1])
    for t, below in enumerate(text):
        for u, above in enumerate(text):
            sees = below[: len(above)] == above
            assert (u <= t < packed.subtree_end[u]) == sees


@examples
@given(SEQUENCES, st.integers(1, 12))
def test_units_cover_the_row_once_and_see_what_the_trie_allows(sequences, max_tokens):
    packed = forest(sequences)
    units = packed.units(max_tokens)
    assert [t for unit in units for t in range(unit.start, unit.end)] == list(range(len(packed.tokens)))
    for unit in units:
        ancestors = [u for start, end in unit.ancestors for u in range(start, end)]
        for t in range(unit.start, unit.end):
            seen = {u for u in range(t + 1) if t < packed.subtree_end[u]}
            assert {u for u in seen if u < unit.start} == set(ancestors)
        assert len(ancestors) == len(set(ancestors))


@examples
@given(SEQUENCES, st.integers(1, 12))
def test_no_unit_is_above_the_limit_and_ranges_that_touch_are_one(sequences, max_tokens):
    for unit in forest(sequences).units(max_tokens):
        assert 0 < unit.end - unit.start <= max_tokens
        ends = [end for _, end in unit.ancestors]
        assert all(end < start for end, (start, _) in zip(ends, unit.ancestors[1:], strict=False))


def test_a_text_without_branches_is_cut_at_the_limit():
    units = forest([list(range(10))]).units(4)
    assert [(unit.start, unit.end, unit.ancestors) for unit in units] == [
        (0, 4, ()), (4, 8, ((0, 4),)), (8, 10, ((0, 8),)),
    ]  # fmt: skip


def test_a_prefix_of_another_sequence_and_a_duplicate_cost_nothing():
    packed = forest([[5, 6, 7], [5, 6], [5, 6, 7], [5, 8]])
    assert packed.tokens.tolist() == [5, 6, 7, 8]
    assert packed.positions.tolist() == [0, 1, 2, 1]
    assert packed.subtree_end.tolist() == [4, 3, 3, 4]
    assert [path.tolist() for path in packed.paths] == [[0, 1, 2], [0, 1], [0, 1, 2], [0, 3]]


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        forest([[1], []])


@st.composite
def batches(draw):
    sequences = draw(SEQUENCES)
    index = st.integers(0, len(sequences) - 1)
    pairs = draw(st.lists(st.tuples(index, index), max_size=3))
    return Batch([Datum(row, [0.0] * len(row)) for row in sequences], pairs)


@examples
@given(batches(), st.integers(1, 30))
def test_micro_batches_cover_every_datum_once_and_keep_pairs_together(batch, max_tokens):
    pieces = list(micro_batches(batch, max_tokens))
    assert sorted(i for piece in pieces for i in piece) == list(range(len(batch.data)))
    for chosen, rejected in batch.pairs:
        assert any(chosen in piece and rejected in piece for piece in pieces)


@examples
@given(batches(), st.integers(1, 30))
def test_micro_batches_stay_in_the_budget_unless_one_bundle_is_larger(batch, max_tokens):
    joined = [{i} for i in range(len(batch.data))]
    for pair in batch.pairs:
        together = set().union(*(group for group in joined if group & set(pair)))
        joined = [group for group in joined if not group & together] + [together]
    merged = lambda members: len(forest([batch.data[i].tokens for i in members]).tokens)  # noqa: E731
    for piece in micro_batches(batch, max_tokens):
        alone = [group for group in joined if group <= set(piece) and merged(group) == merged(piece)]
        assert merged(piece) <= max_tokens or alone


def test_a_group_larger_than_the_budget_repeats_its_prefix():
    rows = [[1] * 10 + [i] * 3 for i in range(2, 6)]
    batch = Batch([Datum(row, [0.0] * 13) for row in rows])
    assert list(micro_batches(batch, 16)) == [[0, 1], [2, 3]]


def test_a_group_that_fits_the_budget_is_not_split():
    rows = [[1] * 4, *([2] * 8 + [i, i] for i in range(3, 7))]
    batch = Batch([Datum(row, [0.0] * len(row)) for row in rows])
    assert list(micro_batches(batch, 16)) == [[0], [1, 2, 3, 4]]


def test_a_piece_more_is_not_made_for_a_heading_that_all_share():
    rows = [[1, 1, i // 2, *[10 + i] * 20] for i in range(6)]
    batch = Batch([Datum(row, [0.0] * len(row)) for row in rows])
    assert list(micro_batches(batch, 63)) == [[0, 1], [2, 3], [4, 5]]
    assert list(micro_batches(batch, 64)) == [[0, 1, 2], [3, 4, 5]]


def test_budgets_count_tokens_after_merging():
    rows = [[1] * 10 + [i] for i in range(2, 8)]
    assert list(micro_batches(Batch([Datum(row, [0.0] * 11) for row in rows]), 16)) == [list(range(6))]


def test_nothing_makes_no_micro_batch():
    assert list(micro_batches(Batch([]), 10)) == []


def test_long_rows_are_merged_quickly():
    trunk = np.arange(3000) % 97
    packed = forest([[*trunk.tolist(), i, *range(400)] for i in range(32)])
    assert len(packed.tokens) == 3000 + 32 * 401


def test_a_text_that_comes_again_and_again_lies_in_one_piece():
    # With some thousands of them a search through all places to cut would take minutes.
    rows = [[1, 2, 3], [4, 5, 6, 7]] * 5000
    pieces = list(micro_batches(Batch([Datum(row, [0.0] * len(row)) for row in rows]), 4))
    assert pieces == [list(range(0, 10_000, 2)), list(range(1, 10_000, 2))]
