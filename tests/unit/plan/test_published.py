"""The planner against step times that others have published: docs/performance.md states the factor."""

from __future__ import annotations

import pytest

from benchmarks.plan_published import RUNS, Published, compare

FACTOR = 1.5


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_a_published_step_time_is_planned_within_the_stated_factor(run: Published) -> None:
    found = compare(run)
    assert 1 / FACTOR < found.ratio < FACTOR
    assert found.fits  # it did run
