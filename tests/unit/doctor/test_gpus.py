"""Machines with and without GPUs, as the checks are told of them."""

from __future__ import annotations

from dataclasses import replace

from megatron_dapo.doctor.gpus import GIB, Gpu, Torch, check_fabric, check_gpus, check_nccl

H800 = Gpu("NVIDIA H800", 80 * GIB, 79 * GIB)
NODE = Torch("2.14.1+cu130", "13.0", "2.30.7", (H800,) * 8, reduced=True, error="")
CPU = Torch("2.13.0+cpu", None, None, (), reduced=None, error="")


def test_eight_free_gpus_are_ok() -> None:
    (found,) = check_gpus(NODE, driver_gpus=8, wanted=8)
    assert (found.level, found.found) == ("ok", "8 x NVIDIA H800, 80 GiB")


def test_a_machine_without_gpus_trains_tiny_models() -> None:
    assert check_gpus(CPU, driver_gpus=0, wanted=8)[0].level == "warning"


def test_gpus_that_torch_does_not_see_are_told_with_what_torch_was_built_for() -> None:
    (found,) = check_gpus(CPU, driver_gpus=8, wanted=None)
    assert found.level == "broken"
    assert "8 in the machine, none for torch: torch 2.13.0+cpu is built for the CPU" in found.found


def test_fewer_gpus_than_the_configuration_wants_are_broken() -> None:
    (found,) = check_gpus(replace(NODE, gpus=(H800,) * 4), driver_gpus=4, wanted=8)
    assert (found.level, found.found) == ("broken", "4 x NVIDIA H800, 80 GiB; trainer.n_gpus_per_node is 8")


def test_memory_that_somebody_has_already_is_told_by_gpu() -> None:
    torch = replace(NODE, gpus=(H800, replace(H800, free=20 * GIB)))
    assert check_gpus(torch, driver_gpus=2, wanted=None)[1].found == "in use already: GPU 1: 60.0 GiB"


def test_a_torch_that_cannot_be_imported_is_told_with_its_error() -> None:
    (found,) = check_gpus("ImportError: libcudnn.so.9", driver_gpus=8, wanted=8)
    assert (found.level, found.found) == ("broken", "torch cannot be imported: ImportError: libcudnn.so.9")
    assert check_nccl("ImportError: libcudnn.so.9", {}, ["eth0"]) == []


def test_nccl_has_to_be_there_and_to_sum() -> None:
    assert [each.level for each in check_nccl(NODE, {}, ["eth0"])] == ["ok"]
    assert check_nccl(CPU, {}, ["eth0"]) == []
    assert check_nccl(replace(NODE, nccl=None, reduced=None), {}, ["eth0"])[0].level == "broken"
    (found,) = check_nccl(replace(NODE, reduced=False, error="unhandled system error"), {}, ["eth0"])
    assert (found.level, "unhandled system error" in found.found) == ("broken", True)


def test_an_interface_that_is_named_and_not_there_is_broken() -> None:
    def level(value: str) -> str:
        return check_nccl(NODE, {"NCCL_SOCKET_IFNAME": value}, ["bond0", "lo"])[0].level

    assert level("ib0") == "broken"
    assert level("=bond") == "broken"
    assert level("bond") == level("=bond0") == level("^docker") == level("ib0,bond0") == "ok"


def test_nodes_without_rdma_are_slow_and_a_single_node_does_not_care() -> None:
    assert check_fabric(1, []) == []
    assert check_fabric(16, [])[0].level == "warning"
    assert check_fabric(16, ["mlx5_0"])[0].level == "ok"
