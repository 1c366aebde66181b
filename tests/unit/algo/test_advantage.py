"""The group advantage against the recipe's golden numbers, the standard library and by hand."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.algo.advantage import group_advantages


def test_advantages_are_the_recipes(case):
    np.testing.assert_allclose(group_advantages(case["reward"], case["group"]), case["advantage"], rtol=0, atol=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2)), min_size=1, max_size=20))
def test_groups_of_any_size_in_any_order_equal_a_slow_loop(rows):
    group_ids, rewards = zip(*rows, strict=True)
    expected = []
    for group, reward in rows:
        members = [r for g, r in rows if g == group]
        mean, std = (statistics.mean(members), statistics.stdev(members)) if len(members) > 1 else (0.0, 1.0)
        expected.append((reward - mean) / (std + 1e-6))
    np.testing.assert_allclose(group_advantages(rewards, group_ids), expected, rtol=1e-6, atol=1e-6)


def test_a_group_of_one_has_mean_zero_and_deviation_one():
    assert group_advantages([3.0, 1.0, -1.0], [7, 2, 2])[0] == pytest.approx(3.0 / (1 + 1e-6), rel=1e-15)


def test_a_pair_worked_by_hand():
    # mean 0, deviation with ddof = 1: sqrt((1 + 1) / 1) = sqrt(2)
    assert group_advantages([1.0, -1.0], [0, 0]).tolist() == pytest.approx([2**-0.5, -(2**-0.5)], rel=1e-5)


def test_a_group_that_earned_the_same_has_no_advantage():
    assert group_advantages([0.25] * 4, [0] * 4).tolist() == [0.0] * 4


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        group_advantages([1.0, 2.0], [0, 0, 1])
