"""A run's workers on one rank, policy and engine beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl, SpmdGroup
from megatron_dapo.workers.rollout import RolloutWorker
from tests.unit.workers.one_rank import engine_of, policy_worker, save_model, settings_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture
def group(model: Path) -> Iterator[SpmdGroup]:
    with policy_worker(settings_of(model)) as worker, SpmdControl.connect() as control:
        host = WorkerHost()
        host.add(worker)
        host.add(RolloutWorker(engine_of(model)))
        yield control.group(host)
