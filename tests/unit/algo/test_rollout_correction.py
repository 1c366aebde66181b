"""Which sequences masked importance sampling leaves out."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.algo.rollout_correction import outside_band

# Ratios of four sequences: 4 and 1 (geometric mean 2), 0.25, 1 and 1 and 8 (mean 2), 1.
RATIOS = np.log([4, 1, 0.25, 1, 1, 8, 1])
SEQUENCE = np.array([0, 0, 1, 2, 2, 2, 3])


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (None, None, [False, False, False, False]),
        (0.5, None, [False, True, False, False]),
        (0.0, None, [False, False, False, False]),
        (None, 1.5, [True, False, True, False]),
        (0.2, 2.5, [False, False, False, False]),
        (0.5, 1.5, [True, True, True, False]),
    ],
)
def test_the_geometric_mean_of_a_sequences_ratios_has_to_be_inside(
    low: float | None, high: float | None, wanted: list[bool]
):
    assert outside_band(RATIOS, SEQUENCE, 4, low, high).tolist() == wanted


def test_tokens_without_a_finite_ratio_say_nothing():
    ratios = np.array([np.nan, np.log(3), np.inf, np.nan])
    assert outside_band(ratios, np.array([0, 0, 0, 1]), 2, None, 2.0).tolist() == [True, False]
