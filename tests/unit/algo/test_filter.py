"""Which groups are kept."""

from __future__ import annotations

import pytest

from megatron_dapo.algo.filter import is_informative


def test_kept_groups_are_the_recipes(case):
    correct = {
        g: [s > 0 for s, own in zip(case["score"], case["group"], strict=True) if own == g] for g in case["group"]
    }
    assert [g for g, values in sorted(correct.items()) if is_informative(values)] == case["kept_groups"]


@pytest.mark.parametrize(
    "values, kept", [([1.0, 1.0], False), ([0.0] * 16, False), ([0.0, 1.0], True), ([0.1, 0.1 + 1e-12], True)]
)
def test_a_group_whose_values_are_all_the_same_is_dropped(values, kept):
    assert is_informative(values) is kept


def test_a_group_of_one_is_kept():
    assert is_informative([0.0])


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="without a response"):
        is_informative([])
