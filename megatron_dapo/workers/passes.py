"""Passes over the ranks that hold a model, as the driver plans them: sequences to replicas, what they find in order.

Which rank computes what is decided here and in `data/packing.py`; who asks does not know how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from megatron_dapo.data.packing import Plan, plan_micro_batches
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.schedule import TokenStats
from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.types import FloatArray, IntArray, SequenceBatch, SequenceRows


@dataclass(frozen=True)
class MicroBatchLimits:
    """How much a micro-batch holds: tokens over all context-parallel ranks, or sequences; one of the two is None."""

    tokens: int | None
    sequences: int | None
    multiple_of: int = 1  # the number of micro-batches, for interleaved pipelines
    quadratic: float = 0.0  # see `plan_micro_batches`

    def plan(self, lengths: IntArray, dp_size: int) -> Plan:
        """Which sequence goes to which data-parallel rank and micro-batch."""
        return plan_micro_batches(
            lengths,
            dp_size,
            max_tokens=self.tokens,
            max_sequences=self.sequences,
            multiple_of=self.multiple_of,
            quadratic=self.quadratic,
        )


class ModelRanks:
    """A group's ranks by their place in the layout."""

    def __init__(self, group: WorkerGroup, layouts: Sequence[RankLayout]):
        """`layouts`: [rank]."""
        self._group, self.layouts = group, layouts
        self.dp_size = layouts[0].dp_size

    def by_replica(self, shard: Callable[[int], Any]) -> list[Any]:
        """[rank] the shard of its data-parallel rank: the same object where ranks share it, so that it travels once."""
        shards = [shard(dp_rank) for dp_rank in range(self.dp_size)]
        return [shards[layout.dp_rank] for layout in self.layouts]

    def start_log_probs(
        self, method: Callable[..., Any], sequences: SequenceRows | SequenceBatch, limits: MicroBatchLimits
    ) -> Callable[[], FloatArray]:
        """Have all ranks begin; the function returned waits for the log-prob of each response token, [N].

        `method` of the ranks' worker: micro-batches in, `TokenStats` out, as `PolicyWorker.log_probs`.
        """
        plan = limits.plan(sequences.lengths, self.dp_size)
        shortest = int(sequences.lengths.argmin())  # keeps an idle rank in step; its result is not looked at
        shards = self.by_replica(
            lambda dp_rank: tuple(sequences.select(indices or [shortest]) for indices in plan[dp_rank])
        )
        under_way = self._group.start(method, shards)

        def wait() -> FloatArray:
            replicas = [(at.dp_rank, stats) for at, stats in zip(self.layouts, under_way.result(), strict=True)]
            reports = [layout.reports for layout in self.layouts]
            return in_order(compress(replicas, reports), plan, sequences.cu_responses)

        return wait


def in_order(replicas: Iterable[tuple[int, Sequence[TokenStats]]], plan: Plan, cu_responses: IntArray) -> FloatArray:
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
