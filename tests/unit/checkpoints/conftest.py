"""A store, and what publishes small checkpoints in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dapo.checkpoints.store import CheckpointStore, next_sequence
from tests.unit.checkpoints.small import Publish, draft_of


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


@pytest.fixture
def publish(store: CheckpointStore) -> Publish:
    """publish(step) makes a whole checkpoint; `weights` are its bytes."""

    def make(step: int, weights: bytes = b"weights", into: CheckpointStore = store) -> Path:
        return into.publish(draft_of(into, step, weights, next_sequence(into, store)), step)

    return make
