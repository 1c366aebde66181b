"""Weights from the policy into the engine that lives in the same process, on every rank."""

from __future__ import annotations

from typing import Protocol

from megatron_dapo.mcore.hf_read import read_hf
from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.workers.policy import PolicyWorker
from megatron_dapo.workers.rollout import RolloutWorker


class WeightSync(Protocol):
    def push(self, version: int) -> None:
        """Give every engine the policy's present weights; its completions carry `version` from here on."""
        ...


class EmbeddedSync:
    def __init__(self, group: WorkerGroup):
        self._group = group

    def push(self, version: int) -> None:
        self._group.call_all(load_own_weights, version)


def load_own_weights(host: WorkerHost, version: int) -> None:
    """Collective over tensor and pipeline parallelism, one tensor at a time."""
    host.get(RolloutWorker).engine.load_weights(host.get(PolicyWorker).export(), version)


def load_checkpoint_weights(host: WorkerHost, path: str) -> None:
    """A Hugging Face checkpoint straight into the engine, as version 0."""
    host.get(RolloutWorker).engine.load_weights(read_hf(path), 0)
