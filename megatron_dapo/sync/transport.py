"""How weights travel to the engine of a process: one small protocol, and the way through memory that a host shares.

`StagedTransport` holds the buckets of a node in shared storages, whole Hugging Face tensors in each. Trainer ranks of
the node write their slices straight in, slices from other nodes are received in, and every engine of the node reads
there: two copies in all, the least there is between processes. Memory is a ring of `SLOTS` buckets, so that the
writers are at work on the next bucket while engines still read one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dapo.progress import PROGRESS
from megatron_dapo.sync.board import Board, Column
from megatron_dapo.sync.buckets import Bucket
from megatron_dapo.sync.network import Network
from megatron_dapo.sync.parts import Part
from megatron_dapo.sync.slices import LocalSlices

SLOTS = 3  # one that is written, one that is read, one that a reader may still look back into


class Transport(Protocol):
    def exchange(self) -> Iterator[tuple[str, Tensor]]:
        """One push's part of this process: send what it has to, and yield (name, tensor) of all that its engine gets.

        Must be exhausted, also where nothing is yielded. A tensor is valid until the iterator is asked for the first
        tensor of the bucket after the next: tensors of one bucket share a storage, so a reader may collect tensors
        until the storage changes and hand on the whole bucket.
        """
        ...

    def abandon(self) -> None:
        """Tell the other processes that this one will not do its part."""
        ...


@dataclass(frozen=True)
class NodeMemory:
    """The shared memory of one node, as one process has it mapped."""

    slots: Sequence[Tensor]  # each [bytes] uint8
    board: Board


class StagedTransport:
    def __init__(
        self,
        part: Part,
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        memory: NodeMemory | None,
        slices: LocalSlices | None,
        network: Network | None,
    ):
        """
        Args:
            memory: None on a node without engines.
            slices: None in a process that is no rank of the trainer.
            network: None where the part has no messages.
        """
        self._part, self._buckets, self._dtype = part, buckets, dtype
        self._memory, self._slices, self._network = memory, slices, network
        self._done = 0  # buckets, over all pushes
        row = part.row
        self._writes = memory is not None and row in part.writers
        self._reads = memory is not None and row in part.readers

    def exchange(self) -> Iterator[tuple[str, Tensor]]:
        for index in range(len(self._buckets)):
            PROGRESS.step(f"bucket {index + 1} of {len(self._buckets)} of the weights")
            self._release(self._done - 1 if index > 1 else 0)
            views = self._bring(index)
            if self._reads:
                yield from self._taken(views)
            self._done += 1
        self._release(self._done)

    def abandon(self) -> None:
        if self._memory is not None:
            self._memory.board.fail()

    def _release(self, buckets: int) -> None:
        """So many buckets, over all pushes, may be written over. Never fewer than at the call before."""
        if self._reads and buckets:
            assert self._memory is not None
            self._memory.board.set(Column.RELEASED, buckets)

    def _bring(self, index: int) -> dict[str, Tensor]:
        """This process's slices of a bucket, to where they are wanted. Returns the bucket in this node's memory."""
        views: dict[str, Tensor] = {}
        if self._memory is not None:
            slots = self._memory.slots
            views = self._buckets[index].views(slots[self._done % len(slots)], self._dtype)
            if self._writes:
                self._memory.board.wait(self._part.readers, Column.RELEASED, self._done + 1 - len(slots))
        for region in self._part.writes[index]:
            assert self._slices is not None
            views[region.name][region.index(views[region.name].dim())].copy_(self._slices.view(region))
        if self._network is not None:
            self._network.run(self._part.messages[index], self._slices, views, self._dtype)
        if self._memory is not None and self._writes:
            if self._memory.slots[0].is_cuda:
                torch.cuda.synchronize()
            self._memory.board.set(Column.WRITTEN, self._done + 1)
        return views

    def _taken(self, views: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        assert self._memory is not None
        self._memory.board.wait(self._part.writers, Column.WRITTEN, self._done + 1)
        yield from views.items()
