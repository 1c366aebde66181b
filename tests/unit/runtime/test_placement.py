"""What is asked of a scheduler and what is said without room; `functional/test_ray.py` asks a real one."""

from __future__ import annotations

import pytest

from megatron_dapo.runtime.placement import Placement, no_room

TWO_NODES = Placement(nodes=2, ranks_per_node=8, device="GPU")
ON_CPU = Placement(nodes=2, ranks_per_node=2, device="CPU")


def test_each_node_gives_its_share_whole() -> None:
    assert TWO_NODES.size == 16
    assert TWO_NODES.bundles() == [{"CPU": 8, "GPU": 8}] * 2
    assert ON_CPU.bundles() == [{"CPU": 2}] * 2


def test_an_engine_over_several_gpus_is_one_rank() -> None:
    engines = Placement(nodes=1, ranks_per_node=2, device="GPU", devices_per_rank=4)
    assert (engines.size, engines.of_a_rank(), engines.bundles()) == (2, {"CPU": 4, "GPU": 4}, [{"CPU": 8, "GPU": 8}])


def test_ranks_get_the_environment_that_torchrun_gives() -> None:
    found = [ON_CPU.environment(rank, "10.0.0.1", 2345) for rank in range(4)]
    assert [each["RANK"] for each in found] == ["0", "1", "2", "3"]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "1", "0", "1"]
    assert {(each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) for each in found} == {("4", "2")}
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found} == {("10.0.0.1", "2345")}


def test_the_one_gpu_that_a_rank_sees_is_its_first() -> None:
    assert {TWO_NODES.environment(rank, "a", 1)["LOCAL_RANK"] for rank in range(16)} == {"0"}


@pytest.mark.parametrize(
    "nodes, there",
    [([{"CPU": 64, "GPU": 4}, {"CPU": 8}], "node 0: 64 CPU, 4 GPU; node 1: 8 CPU, 0 GPU"), ([], "no node")],
)
def test_without_room_it_is_told_what_is_wanted_there_and_free(nodes: list[dict[str, float]], there: str) -> None:
    said = no_room([TWO_NODES], nodes, {"CPU": 3.0, "GPU": 1.0, "memory": 1e9}, 60)
    assert "no room for 16 ranks within 60 s. Wanted: 2 x (8 CPU, 8 GPU), each on one node." in said
    assert f"The cluster has {there}. Free now: 3 CPU, 1 GPU." in said
    assert "trainer.n_gpus_per_node" in said


def test_two_groups_that_are_placed_together_are_both_told() -> None:
    said = no_room([TWO_NODES, ON_CPU], [], {}, 60)
    assert "no room for 20 ranks within 60 s. Wanted: 2 x (8 CPU, 8 GPU) and 2 x (2 CPU, 0 GPU), each" in said
