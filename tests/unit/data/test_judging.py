"""What the filter looks at."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.config.tree import FilterGroupsConfig
from megatron_dapo.data.generation import ClosedDraw, Draw
from megatron_dapo.data.judging import UnknownMetricError, judge, metric_values
from megatron_dapo.types import Completion, RewardResult, Sample
from tests.unit.data.fakes import dataset, graded


def sample(result: RewardResult, penalty: float = 0.0, kl: float = 0.0, version: int = 0) -> Sample:
    completion = Completion(5, 0, np.array([1]), np.zeros(1, np.float32), "stop", version)
    return Sample(completion, result, penalty, result.score + penalty - kl)


PAIR = [sample(graded(1.0, score=0.7, style=3.0), -0.25, 0.125), sample(graded(0.0, score=-0.7, style=2.0), -0.5, 0.25)]


@pytest.mark.parametrize(
    "metric, values",
    [
        ("acc", [1.0, 0.0]),
        ("score", [0.7, -0.7]),
        ("style", [3.0, 2.0]),
        ("seq_reward", [0.7 - 0.25, -0.7 - 0.5]),
        ("seq_final_reward", [0.7 - 0.25 - 0.125, -0.7 - 0.5 - 0.25]),
    ],
)
def test_each_metric_is_its_own_number(metric: str, values: list[float]) -> None:
    assert metric_values(PAIR, metric) == values


def test_a_metric_that_one_sample_lacks_is_refused() -> None:
    with pytest.raises(UnknownMetricError, match=r"metric=style, .* only acc, score for draw 5; choose one of those"):
        metric_values([PAIR[0], sample(graded(0.0))], "style")


def test_a_metric_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UnknownMetricError, match=r"metric=style is not finite for draw 5: \[3.0, nan\]"):
        metric_values([PAIR[0], sample(graded(0.0, style=float("nan")))], "style")


def test_a_group_carries_the_version_of_its_oldest_response() -> None:
    samples = tuple(sample(graded(acc), version=version) for acc, version in [(1.0, 4), (0.0, 3), (1.0, 5)])
    closed = [ClosedDraw(Draw(5, dataset(1)[0]), samples, (), 0)]
    [group] = judge(closed, FilterGroupsConfig(enable=True), 3, None).accepted
    assert group.weight_version == 3


def test_a_group_is_all_right_or_all_wrong_by_acc_even_where_another_metric_keeps_it() -> None:
    def closed(index: int, *results: RewardResult) -> ClosedDraw:
        return ClosedDraw(Draw(index, dataset(9)[index]), tuple(map(sample, results)), (), 0)

    groups = [
        closed(0, graded(1.0, score=0.1), graded(1.0, score=0.2)),
        closed(1, graded(0.0, score=0.3), graded(0.0, score=0.3)),
        closed(2, graded(1.0, score=0.5), graded(0.0, score=0.5)),
        closed(3, graded(0.5, score=0.5), graded(0.5, score=0.5)),
    ]
    verdict = judge(groups, FilterGroupsConfig(enable=True, metric="score"), 2, None)
    assert [group.draw_index for group in verdict.accepted] == [0]
    stats = verdict.stats
    assert (stats.groups_all_right, stats.groups_all_wrong) == (1, 1)
    assert (stats.groups_uniform, stats.groups_uniform_other) == (3, 2)
