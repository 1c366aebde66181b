"""Weights from the policy into the engine of the same rank: in its process, or its child."""

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


class CheckpointSync:
    """The weights of a Hugging Face checkpoint in place of a policy's."""

    def __init__(self, group: WorkerGroup, path: str):
        self._group, self._path = group, path

    def push(self, version: int) -> None:
        self._group.call_all(load_checkpoint_weights, (self._path, version))


def load_own_weights(host: WorkerHost, version: int) -> None:
    """Collective over tensor and pipeline parallelism, one tensor at a time."""
    host.get(RolloutWorker).load_weights(host.get(PolicyWorker).export(), version)


def load_checkpoint_weights(host: WorkerHost, named: tuple[str, int]) -> None:
    """A Hugging Face checkpoint straight into the engine: (path, version)."""
    path, version = named
    host.get(RolloutWorker).load_weights(read_hf(path), version)
