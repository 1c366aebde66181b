"""A policy and an engine in this process, of one tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.workers.one_rank import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "qwen2")
