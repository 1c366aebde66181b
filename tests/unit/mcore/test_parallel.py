"""Process groups of a process that is alone, and layouts that do not fit the job."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_dapo.config.tree import ConfigError, MegatronConfig
from megatron_dapo.mcore.parallel import check_divides, current_layout, initialize
from tests.unit.mcore.helpers import ONE, one_process


@pytest.mark.parametrize(
    ("config", "world_size", "named"),
    [
        ({"tensor_model_parallel_size": 4}, 6, ["world size 6", "tensor 4", "= 4", "4 or 8"]),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            3,
            ["pipeline 2", "= 4", "start 4 processes"],
        ),
        ({"context_parallel_size": 3}, 8, ["context 3", "= 3", "6 or 9"]),
    ],
)
def test_a_world_that_the_model_does_not_divide_is_refused(config: dict[str, int], world_size: int, named: list[str]):
    with pytest.raises(ConfigError) as caught:
        check_divides(MegatronConfig(**config), world_size)
    assert [word for word in named if word not in str(caught.value)] == []


@pytest.mark.parametrize("world_size", [4, 8, 12])
def test_a_world_that_holds_whole_models_is_accepted(world_size: int):
    check_divides(MegatronConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), world_size)


def test_a_process_that_is_alone_can_run_again_and_again():
    for _ in range(2):
        with one_process() as layout:
            assert layout == current_layout() == ONE
            assert layout.reports
        assert not dist.is_initialized()


def test_a_layout_that_does_not_fit_is_refused_by_a_process_that_is_alone():
    try:
        with pytest.raises(ConfigError, match=r"world size 1 is not divisible by tensor 2 .* start 2 processes"):
            initialize(MegatronConfig(tensor_model_parallel_size=2), seed=1)
    finally:
        dist.destroy_process_group()
