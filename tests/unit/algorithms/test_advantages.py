from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.algorithms.advantages import advantages, is_constant
from tercet.errors import ConfigError

SCALES = ("none", "std", "rloo", "batch")
GROUPS = [[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]


def test_each_scale_by_hand():
    # Means 3 and 1; centred (-2, -1, 3) and (-1, -1, 2); squares sum to 14 and 6: standard deviations sqrt(7), sqrt(3).
    assert advantages(GROUPS) == [[-2, -1, 3], [-1, -1, 2]]
    assert advantages(GROUPS, scale="rloo") == [pytest.approx([-3, -1.5, 4.5]), pytest.approx([-1.5, -1.5, 3])]
    seven, three = math.sqrt(7) + 1e-4, math.sqrt(3) + 1e-4
    assert advantages(GROUPS, scale="std") == [
        pytest.approx([-2 / seven, -1 / seven, 3 / seven]), pytest.approx([-1 / three, -1 / three, 2 / three])
    ]  # fmt: skip
    # All six have mean 2, squares sum to 26: (26 / 5) under the root.
    spread = math.sqrt(26 / 5) + 1e-4
    assert advantages(GROUPS, scale="batch")[0] == pytest.approx([-2 / spread, -1 / spread, 3 / spread])


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    group = [1.0, 2.0, 6.0, -3.0]
    expected = [r - (sum(group) - r) / 3 for r in group]
    assert advantages([group], scale="rloo")[0] == pytest.approx(expected)


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_equal_rewards_teaches_nothing(scale):
    found = advantages([[0.7, 0.7, 0.7], [0.7, 0.7, 0.7]], scale=scale)
    assert found == [[0.0] * 3] * 2
    assert is_constant([0.7, 0.7]) and not is_constant([0.7, 0.8])


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_is_refused(scale):
    with pytest.raises(ConfigError, match="a group of 1 has nothing to compare with"):
        advantages([[1.0, 2.0], [1.0]], scale=scale)


REWARDS = st.lists(st.lists(st.floats(-10, 10), min_size=2, max_size=5), min_size=1, max_size=5)


@given(REWARDS, st.sampled_from(SCALES))
def test_every_group_is_centred_and_keeps_its_order(groups, scale):
    for group, found in zip(groups, advantages(groups, scale=scale), strict=True):
        assert sum(found) == pytest.approx(0, abs=1e-6)
        for a, b in zip(
            sorted(zip(group, found, strict=True)), sorted(zip(group, found, strict=True))[1:], strict=False
        ):
            assert a[1] <= b[1]


@given(REWARDS, st.floats(-5, 5), st.sampled_from(("none", "std", "rloo")))
def test_what_is_added_to_a_whole_group_changes_nothing(groups, shift, scale):
    shifted = advantages([[r + shift for r in group] for group in groups], scale=scale)
    for a, b in zip(shifted, advantages(groups, scale=scale), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@given(REWARDS, st.sampled_from(("none", "std", "rloo")))
def test_groups_do_not_know_of_each_other(groups, scale):
    assert advantages(groups[::-1], scale=scale) == advantages(groups, scale=scale)[::-1]
