"""Hosts with enough and too little of something, as the checks are told of them."""

from __future__ import annotations

from pathlib import Path

from megatron_dapo.doctor.host import (
    GIB,
    UNLIMITED,
    check_disk,
    check_hostname,
    check_limits,
    check_ports,
    check_scratch,
    check_shared_memory,
)

GOOD = {"open files": 1048576, "processes": UNLIMITED, "locked memory": UNLIMITED}


def test_dockers_64_mb_of_shared_memory_are_broken_for_engines_and_few_for_gpus() -> None:
    found = check_shared_memory(64 * 2**20, ranks=8, bucket_bytes=GIB // 2, gpus=8)
    assert (found.level, found.found) == ("broken", "0.1 GiB free, weights on their way to 8 engines take 5.5")
    assert "--shm-size=6g" in found.remedy
    assert check_shared_memory(9 * GIB, ranks=8, bucket_bytes=GIB // 2, gpus=8).level == "warning"
    assert check_shared_memory(64 * GIB, ranks=8, bucket_bytes=GIB // 2, gpus=8).level == "ok"
    assert check_shared_memory(64 * 2**20, ranks=1, bucket_bytes=0, gpus=0).level == "ok"


def test_limits_of_a_process_have_two_bounds() -> None:
    def levels(**changed: int) -> list[str]:
        return [each.level for each in check_limits(GOOD | {k.replace("_", " "): v for k, v in changed.items()}, 1)]

    assert levels() == ["ok", "ok"]
    assert levels(open_files=1024) == ["broken", "ok"]
    assert levels(open_files=20000, processes=4096) == ["warning", "warning"]


def test_locked_memory_matters_between_nodes() -> None:
    small = GOOD | {"locked memory": 8 * 2**20}
    assert len(check_limits(small, nodes=1)) == 2
    assert check_limits(small, nodes=16)[-1].found == "8192 KiB locked memory: RDMA needs more"


def test_a_disk_has_to_hold_the_checkpoints_that_a_run_keeps() -> None:
    path = Path("/data")
    assert check_disk(2000 * GIB, path, True, 450 * GIB, checkpoints=4).level == "ok"
    found = check_disk(1000 * GIB, path, True, 450 * GIB, checkpoints=4)
    assert (found.level, "4 checkpoints of about 450 GiB" in found.found) == ("broken", True)
    assert check_disk(1000 * GIB, path, False, 0, 0).level == "broken"
    assert check_disk(3 * GIB, path, True, 0, 0).level == "warning"


def test_ray_stops_where_the_scratch_disk_is_almost_full() -> None:
    assert check_scratch(40 * GIB, 1000 * GIB, Path("/tmp")).level == "broken"
    assert check_scratch(60 * GIB, 1000 * GIB, Path("/tmp")).level == "ok"


def test_ports_have_to_open_and_rays_are_told_where_a_head_would_want_them() -> None:
    assert check_ports(False, {}, starts_ray=True)[0].level == "broken"
    taken = {6379: True, 8265: False}
    assert check_ports(True, taken, starts_ray=True)[0].found == "in use: 6379 (a Ray head or Redis)"
    assert check_ports(True, taken, starts_ray=False)[0].level == "ok"
    assert check_ports(True, {6379: False}, starts_ray=True)[0].level == "ok"


def test_a_name_that_leads_to_loopback_matters_between_nodes() -> None:
    assert check_hostname("n1", "127.0.1.1", nodes=1)[0].level == "ok"
    assert check_hostname("n1", "127.0.1.1", nodes=16)[0].level == "warning"
    assert check_hostname("n1", None, nodes=1)[0].level == "warning"
    assert check_hostname("n1", "10.0.0.1", nodes=16)[0].level == "ok"
