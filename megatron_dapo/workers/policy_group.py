"""The policy's ranks as the driver sees them: sequences in, log-probs and updates out, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dapo.config.tree import OffloadPart
from megatron_dapo.data.minibatch import Update
from megatron_dapo.data.packing import Plan
from megatron_dapo.digests import FileDigest, digest_files
from megatron_dapo.mcore.shard_write import WriteFailure, Written
from megatron_dapo.progress import PROGRESS
from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.types import FloatArray, IntArray, SequenceBatch, SequenceRows
from megatron_dapo.workers.passes import MicroBatchLimits, ModelRanks, in_order
from megatron_dapo.workers.policy import PolicyWorker, SaveOrder, UpdateShard, UpdateStats


@dataclass(frozen=True)
class PassLimits:
    """Of each kind of pass."""

    update: MicroBatchLimits
    log_prob: MicroBatchLimits
    reference: MicroBatchLimits


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update over all ranks."""

    applied: bool
    grad_norm: float
    lr: float
    sums: dict[str, float]
    logp: FloatArray | None = None  # [N] of the mini-batch's tokens under the weights before it, where asked for


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the message says why, and what became of the state."""


class PolicyGroup:
    """All ranks of the policy behind one object on the driver."""

    def __init__(self, group: WorkerGroup, limits: PassLimits):
        self._group, self._limits = group, limits
        self._ranks = ModelRanks(group, group.call_all(PolicyWorker.rank_layout))

    def log_probs(self, sequences: SequenceRows | SequenceBatch) -> FloatArray:
        """[N] log-prob of each response token under the present weights."""
        return self._ranks.start_log_probs(PolicyWorker.log_probs, sequences, self._limits.log_prob)()

    def reference_log_probs(self, sequences: SequenceRows | SequenceBatch) -> FloatArray:
        """[N] the same under the frozen reference."""
        return self._ranks.start_log_probs(PolicyWorker.reference_log_probs, sequences, self._limits.reference)()

    def plan(self, lengths: IntArray) -> Plan:
        """Which sequence of a mini-batch goes to which data-parallel rank and micro-batch."""
        return self._limits.update.plan(lengths, self._ranks.dp_size)

    def update(self, updates: Sequence[Update], lr: float, report_first: bool = False) -> Iterator[UpdateResult]:
        """The optimizer updates in their order, as they are done.

        `report_first`: the first one's result tells the log-probs of its tokens under the weights before it.
        """
        shards = self._ranks.by_replica(
            lambda dp_rank: UpdateShard(tuple(update.ranks[dp_rank] for update in updates), lr, report_first)
        )
        waiting: dict[int, list[UpdateStats]] = {}
        for rank, stats in self._group.start(PolicyWorker.update, shards):
            waiting.setdefault(rank, []).append(stats)
            if len(waiting) == self._ranks.dp_size and all(waiting.values()):
                # In the order of ranks, not of arrival: sums of floats depend on it.
                replicas = [(self._ranks.layouts[rank].dp_rank, waiting[rank].pop(0)) for rank in sorted(waiting)]
                yield _merged(replicas, updates[0] if report_first else None)
                report_first = False

    @property
    def layout(self) -> dict[str, int]:
        """How the model is spread: the sizes of each kind of parallelism, and of the world."""
        first = self._ranks.layouts[0]
        sizes = {"tp_size": first.tp_size, "pp_size": first.pp_size, "cp_size": first.cp_size, "dp_size": first.dp_size}
        return {"world_size": len(self._ranks.layouts), **sizes}

    def start_save(self, path: str, background: bool) -> None:
        """Begin to write model and optimizer into the existing, empty folder `path`."""
        self._group.call_all(PolicyWorker.start_save, SaveOrder(path, background))

    def finish_save(self, wait: bool) -> dict[str, FileDigest] | None:
        """The end of what `start_save` began: the checksums of the files that the ranks wrote, by name. None while
        a rank is still writing.

        Raises:
            CheckpointWriteError: a rank could not write its part. The save is given up on all of them.
        """
        found: list[Written | WriteFailure | None] = self._group.call_all(PolicyWorker.save_outcome, wait)
        failures = {rank: part for rank, part in enumerate(found) if isinstance(part, WriteFailure)}
        if failures:
            self._group.call_all(PolicyWorker.finish_save)
        elif any(part is None for part in found):
            return None
        else:
            parts = [part for part in found if isinstance(part, Written)]
            shards = [[part.results for part in parts], *([None] * (self._group.size - 1))]
            ends = self._group.call(PolicyWorker.finish_save, shards)
            failures = {rank: end for rank, end in enumerate(ends) if end is not None}
            if not failures:
                return {name: digest for part in parts for name, digest in part.digests.items()}
        raise CheckpointWriteError("; ".join(f"rank {rank}: {failure.reason}" for rank, failure in failures.items()))

    def load(self, path: str) -> None:
        """Read what was saved, on any layout."""
        self._group.call_all(PolicyWorker.load, path)

    def rng_states(self) -> list[dict[str, Any]]:
        """[rank] the state of all its random streams."""
        return self._group.call_all(PolicyWorker.rng_state)

    def set_rng_states(self, states: Sequence[dict[str, Any]]) -> None:
        """[rank] what `rng_states` gave on the same layout."""
        self._group.call(PolicyWorker.set_rng_state, states)

    def digest_files(self, root: str, names: Sequence[str]) -> dict[str, FileDigest | None]:
        """The checksums of files below `root`, read by all ranks, each its share; None for one that is missing."""
        shares = [(root, tuple(names[rank :: self._group.size])) for rank in range(self._group.size)]
        return {name: digest for share in self._group.call(_digest_share, shares) for name, digest in share.items()}

    def save_hf(self, path: str) -> None:
        """Write the present weights as a Hugging Face checkpoint with config and tokenizer."""
        self._group.call_all(PolicyWorker.save_hf, path)

    def leave_device(self, parts: Sequence[OffloadPart]) -> None:
        """See `PolicyWorker.leave_device`."""
        self._group.call_all(PolicyWorker.leave_device, tuple(parts))


@PROGRESS.patient("a checkpoint is read")
def _digest_share(host: WorkerHost, share: tuple[str, tuple[str, ...]]) -> dict[str, FileDigest | None]:
    root, names = share
    return digest_files(Path(root), names)


def _merged(replicas: Sequence[tuple[int, UpdateStats]], reported: Update | None) -> UpdateResult:
    """Sums are added over data-parallel replicas; the rest is the same on all."""
    first = replicas[0][1]
    sums = {name: sum(stats.sums[name] for _, stats in replicas) for name in first.sums}
    logp = None
    if reported is not None:
        logp = in_order([(dp, stats.tokens) for dp, stats in replicas], reported.plan, reported.cu_responses)
    return UpdateResult(first.applied, first.grad_norm, first.lr, sums, logp)
