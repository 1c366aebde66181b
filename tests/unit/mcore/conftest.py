"""Tiny checkpoints, and Megatron's process groups for as long as a test file runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_dapo.mcore.parallel import RankLayout
from tests.functional.tiny_models import save_tiny_model
from tests.unit.mcore.helpers import one_process


@pytest.fixture(scope="module")
def layout() -> Iterator[RankLayout]:
    with one_process() as layout:
        yield layout


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint_of(family, tied) is the folder of a tiny Hugging Face checkpoint of two layers."""

    @cache
    def make(family: str = "qwen2", tied: bool = False) -> Path:
        path = tmp_path_factory.mktemp("models") / f"{family}{'-tied' * tied}"
        save_tiny_model(path, family, tied, layers=2)
        return path

    return make
