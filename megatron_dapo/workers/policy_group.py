"""The policy's ranks as the driver sees them: sequences in, log-probs and updates out, whatever the layout.

Which rank computes what is decided here and in `data/packing.py`; the trainer does not know how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from megatron_dapo.data.minibatch import Update
from megatron_dapo.data.packing import Plan, plan_micro_batches
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.schedule import TokenStats
from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.types import FloatArray, IntArray, SequenceBatch
from megatron_dapo.workers.policy import PolicyWorker, UpdateShard, UpdateStats


@dataclass(frozen=True)
class MicroBatchLimits:
    """How much a micro-batch holds: tokens over all context-parallel ranks, or sequences; one of the two is None."""

    tokens: int | None
    sequences: int | None
    multiple_of: int = 1  # the number of micro-batches, for interleaved pipelines
    quadratic: float = 0.0  # see `plan_micro_batches`


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


class PolicyGroup:
    """All ranks of the policy behind one object on the driver."""

    def __init__(self, group: WorkerGroup, limits: PassLimits):
        self._group, self._limits = group, limits
        self._layouts: list[RankLayout] = group.call_all(PolicyWorker.rank_layout)
        self.dp_size = self._layouts[0].dp_size

    def log_probs(self, sequences: SequenceBatch) -> FloatArray:
        """[N] log-prob of each response token under the present weights."""
        return self._log_probs(PolicyWorker.log_probs, sequences, self._limits.log_prob)

    def reference_log_probs(self, sequences: SequenceBatch) -> FloatArray:
        """[N] the same under the frozen reference."""
        return self._log_probs(PolicyWorker.reference_log_probs, sequences, self._limits.reference)

    def plan(self, lengths: IntArray) -> Plan:
        """Which sequence of a mini-batch goes to which data-parallel rank and micro-batch."""
        return _plan(lengths, self.dp_size, self._limits.update)

    def update(self, updates: Sequence[Update], lr: float, report_first: bool = False) -> Iterator[UpdateResult]:
        """The optimizer updates in their order, as they are done.

        `report_first`: the first one's result tells the log-probs of its tokens under the weights before it.
        """
        shards = [
            UpdateShard(tuple(update.ranks[layout.dp_rank] for update in updates), lr, report_first)
            for layout in self._layouts
        ]
        waiting: dict[int, list[UpdateStats]] = {}
        for rank, stats in self._group.start(PolicyWorker.update, shards):
            waiting.setdefault(rank, []).append(stats)
            if len(waiting) == self.dp_size and all(waiting.values()):
                # In the order of ranks, not of arrival: sums of floats depend on it.
                replicas = [(self._layouts[rank].dp_rank, waiting[rank].pop(0)) for rank in sorted(waiting)]
                yield _merged(replicas, updates[0] if report_first else None)
                report_first = False

    def save(self, path: str) -> None:
        """Write model and optimizer into the folder `path`."""
        self._group.call_all(PolicyWorker.save, path)

    def load(self, path: str) -> None:
        """Read what `save` wrote, on any layout."""
        self._group.call_all(PolicyWorker.load, path)

    def save_hf(self, path: str) -> None:
        """Write the present weights as a Hugging Face checkpoint with config and tokenizer."""
        self._group.call_all(PolicyWorker.save_hf, path)

    def _log_probs(self, method: Callable[..., Any], sequences: SequenceBatch, limits: MicroBatchLimits) -> FloatArray:
        plan = _plan(sequences.lengths, self.dp_size, limits)
        shortest = int(sequences.lengths.argmin())  # keeps an idle rank in step; its result is not looked at
        shards = [
            tuple(sequences.select(indices or [shortest]) for indices in plan[layout.dp_rank])
            for layout in self._layouts
        ]
        found: list[list[TokenStats]] = self._group.call(method, shards)
        replicas = [(layout.dp_rank, stats) for layout, stats in zip(self._layouts, found, strict=True)]
        reports = [layout.reports for layout in self._layouts]
        return _in_order(compress(replicas, reports), plan, sequences.cu_responses)


def _plan(lengths: IntArray, dp_size: int, limits: MicroBatchLimits) -> Plan:
    return plan_micro_batches(
        lengths,
        dp_size,
        max_tokens=limits.tokens,
        max_sequences=limits.sequences,
        multiple_of=limits.multiple_of,
        quadratic=limits.quadratic,
    )


def _in_order(replicas: Iterable[tuple[int, Sequence[TokenStats]]], plan: Plan, cu_responses: IntArray) -> FloatArray:
    """[N] the log-probs that data-parallel ranks found for the micro-batches of `plan`, sequence by sequence."""
    logp = np.zeros(int(cu_responses[-1]), np.float32)
    for dp_rank, stats in replicas:
        for indices, micro_batch in zip(plan[dp_rank], stats, strict=True):
            _scatter(logp, cu_responses, indices, micro_batch.logp)
    return logp


def _scatter(into: FloatArray, offsets: IntArray, indices: Sequence[int], values: FloatArray) -> None:
    start = 0
    for index in indices:
        stop = start + int(offsets[index + 1] - offsets[index])
        into[offsets[index] : offsets[index + 1]] = values[start:stop]
        start = stop


def _merged(replicas: Sequence[tuple[int, UpdateStats]], reported: Update | None) -> UpdateResult:
    """Sums are added over data-parallel replicas; the rest is the same on all."""
    first = replicas[0][1]
    sums = {name: sum(stats.sums[name] for _, stats in replicas) for name in first.sums}
    logp = None
    if reported is not None:
        logp = _in_order([(dp, stats.tokens) for dp, stats in replicas], reported.plan, reported.cu_responses)
    return UpdateResult(first.applied, first.grad_norm, first.lr, sums, logp)
