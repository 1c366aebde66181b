from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.regression.series import BANDWIDTH, Series, first_at

EVERY_80 = np.arange(0.0, 4000.0, 80.0)


def test_a_straight_line_is_its_own_smoothed_curve_up_to_its_ends() -> None:
    line = Series(EVERY_80, 3.0 + 0.01 * EVERY_80)
    np.testing.assert_allclose(line.smoothed(EVERY_80), line.values, rtol=1e-9)


def test_smoothing_is_the_weighted_straight_line_that_polyfit_finds() -> None:
    values = np.random.default_rng(0).standard_normal(len(EVERY_80))
    for place in (0.0, 1234.0, EVERY_80[-1]):
        weights = np.exp(-0.5 * ((EVERY_80 - place) / BANDWIDTH) ** 2)
        wanted = np.polyval(np.polyfit(EVERY_80, values, 1, w=np.sqrt(weights)), place)
        assert Series(EVERY_80, values).smoothed(np.array([place]))[0] == pytest.approx(wanted, rel=1e-6)


def test_a_single_point_is_smooth_however_far_one_asks() -> None:
    np.testing.assert_allclose(Series(np.array([80.0]), np.array([0.4])).smoothed(np.array([0.0, 1e5])), 0.4)


def test_jitter_is_the_deviation_of_independent_errors_and_leaves_a_drift_out() -> None:
    errors = np.random.default_rng(0).normal(0, 0.02, 4000)
    updates = np.arange(4000.0)
    assert Series(updates, errors).jitter() == pytest.approx(0.02, rel=0.05)
    assert Series(updates, errors + np.sin(updates / 500)).jitter() == pytest.approx(0.02, rel=0.05)


def test_jitter_of_three_points_by_hand() -> None:
    assert Series(np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 0.0])).jitter() == pytest.approx(2 / 6**0.5)
    with pytest.raises(ValueError, match="three at least"):
        Series(np.array([0.0, 1.0]), np.array([0.0, 1.0])).jitter()


def test_the_first_place_at_a_level() -> None:
    assert first_at(np.array([0.0, 80.0, 160.0]), np.array([0.1, 0.5, 0.2]), 0.2) == 80
    assert first_at(np.array([0.0, 80.0]), np.array([0.1, 0.2]), 0.3) is None


@pytest.mark.parametrize(
    ("updates", "values"),
    [([0.0], [float("nan")]), ([0.0, 0.0], [1.0, 1.0]), ([], []), ([0.0], [1.0, 2.0])],
    ids=["NaN", "an update twice", "empty", "other lengths"],
)
def test_what_is_no_series_is_refused(updates: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="series"):
        Series(np.array(updates), np.array(values))
