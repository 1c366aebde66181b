"""How weights travel to the engine of a process: one small protocol, and the way through memory that a host shares.

`StagedTransport` holds the buckets of a node in one shared memory, whole Hugging Face tensors in each. Trainer ranks of
the node write their slices straight in, slices from other nodes are received in, and every engine of the node reads
there: two copies in all, the least there is between processes. The memory is a ring (`ring.py`), so that writers are
at work on the next buckets while engines still read earlier ones.
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
from megatron_dapo.sync.regions import Region
from megatron_dapo.sync.ring import places
from megatron_dapo.sync.slices import LocalSlices


class Transport(Protocol):
    def exchange(self) -> Iterator[tuple[str, Tensor]]:
        """One push's part of this process: send what it has to, and yield (name, tensor) of all that its engine gets.

        Must be exhausted, also where nothing is yielded. A tensor is valid until the iterator is asked for the next.
        """
        ...

    def abandon(self) -> None:
        """Tell the other processes that this one will not do its part."""
        ...


@dataclass(frozen=True)
class NodeMemory:
    """The shared memory of one node, as one process has it mapped."""

    ring: Tensor  # [bytes] uint8
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
        self._part, self._dtype = part, dtype
        self._memory, self._slices, self._network = memory, slices, network
        self._done = 0  # buckets, over all pushes
        row = part.row
        self._writes = memory is not None and row in part.writers
        self._reads = memory is not None and row in part.readers
        # A bucket lies at the same place in every push, so what is known of it is found once.
        self._after = [0] * len(buckets)
        self._views: list[dict[str, Tensor]] = [{} for _ in buckets]
        if memory is not None:
            laid = places([bucket.nbytes for bucket in buckets], len(memory.ring))
            self._after = [place.after for place in laid]
            self._views = [b.views(memory.ring[p.start :], dtype) for b, p in zip(buckets, laid, strict=True)]
        self._targets = [
            [(region, _within(views, region)) for region in regions]
            for regions, views in zip(part.writes, self._views, strict=True)
        ]

    def exchange(self) -> Iterator[tuple[str, Tensor]]:
        for index, views in enumerate(self._views):
            PROGRESS.step(f"bucket {index + 1} of {len(self._views)} of the weights")
            self._bring(index)
            if self._reads:
                yield from self._taken(index, views)
        self._done += len(self._views)

    def abandon(self) -> None:
        if self._memory is not None:
            self._memory.board.fail()

    def _bring(self, index: int) -> None:
        """This process's slices of a bucket, to where they are wanted."""
        messages = self._part.messages[index]
        if self._memory is not None and self._writes and (self._targets[index] or messages):
            self._memory.board.wait(self._part.readers, Column.RELEASED, self._done + self._after[index])
        for region, target in self._targets[index]:
            assert self._slices is not None
            target.copy_(self._slices.view(region))
        if self._network is not None:
            self._network.run(messages, self._slices, self._views[index], self._dtype)
        if self._writes:
            self._tell(Column.WRITTEN, index)

    def _taken(self, index: int, views: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        assert self._memory is not None
        self._memory.board.wait(self._part.writers, Column.WRITTEN, self._done + index + 1)
        yield from views.items()
        self._tell(Column.RELEASED, index)

    def _tell(self, column: Column, index: int) -> None:
        """The board, that this process is through with a bucket."""
        assert self._memory is not None
        if self._memory.ring.is_cuda:  # where a copy has only been queued when the call returns
            torch.cuda.synchronize()
        self._memory.board.set(column, self._done + index + 1)


def _within(views: dict[str, Tensor], region: Region) -> Tensor:
    whole = views[region.name]
    return whole[region.index(whole.dim())]
