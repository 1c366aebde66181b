"""The frozen reference as the driver sees it: on the policy's ranks, or on ranks of its own beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.types import FloatArray, SequenceBatch, SequenceRows
from megatron_dapo.workers.passes import MicroBatchLimits, ModelRanks
from megatron_dapo.workers.policy_group import PolicyGroup
from megatron_dapo.workers.reference import ReferenceWorker


class Reference(Protocol):
    def start_log_probs(self, sequences: SequenceRows | SequenceBatch) -> Callable[[], FloatArray]:
        """The function returned gives the log-prob of each response token, [N]; call it before starting the next."""
        ...


@dataclass(frozen=True)
class SharedReference:
    """On the policy's ranks, which compute one after the other: nothing happens before the result is asked for."""

    policy: PolicyGroup

    def start_log_probs(self, sequences: SequenceRows | SequenceBatch) -> Callable[[], FloatArray]:
        """See `Reference`."""
        return lambda: self.policy.reference_log_probs(sequences)


class OwnReference:
    """On ranks of its own, which compute while the policy's do."""

    def __init__(self, group: WorkerGroup, limits: MicroBatchLimits):
        self._ranks = ModelRanks(group, group.call_all(ReferenceWorker.rank_layout))
        self._limits = limits

    def start_log_probs(self, sequences: SequenceRows | SequenceBatch) -> Callable[[], FloatArray]:
        """See `Reference`."""
        return self._ranks.start_log_probs(ReferenceWorker.log_probs, sequences, self._limits)
