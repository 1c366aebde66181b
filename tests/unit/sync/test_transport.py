"""One writer and two readers on threads, through a small ring: order, what stays valid, and what failing does."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.sync.board import Board, Column, PeerError
from megatron_dapo.sync.buckets import Bucket, make_buckets
from megatron_dapo.sync.parts import Processes, make_parts
from megatron_dapo.sync.plan import EngineRank, Topology, make_plan, megatron_ranks
from megatron_dapo.sync.regions import Region
from megatron_dapo.sync.ring import ring_bytes
from megatron_dapo.sync.transport import NodeMemory, StagedTransport
from tests.unit.sync.layouts import model_shape

SHAPE = model_shape()


class Weights:
    """Stands for a rank that holds the model: every element says of which push and tensor it is."""

    def __init__(self) -> None:
        self.version = 0

    def value(self, name: str) -> float:
        return 1000.0 * self.version + list(hf_shapes(SHAPE)).index(name)

    def view(self, region: Region) -> Tensor:
        dims = len(hf_shapes(SHAPE)[region.name])
        return torch.full([s.stop - s.start for s in region.index(dims)], self.value(region.name))


class Node:
    """Process 0 writes, 1 and 2 read; their memory is seen by forked processes too."""

    def __init__(self, bucket_bytes: int):
        engines = (EngineRank(0, 0, 1, 0), EngineRank(1, 0, 1, 0))
        plan = make_plan(SHAPE, Topology(megatron_ranks(1, 1, [0]), engines, 1, 1), 4)
        self.weights, self.buckets = Weights(), make_buckets(hf_shapes(SHAPE), 4, bucket_bytes)
        self.parts = make_parts(plan, self.buckets, Processes((0,), (1, 2)))
        size = ring_bytes([bucket.nbytes for bucket in self.buckets])
        self.ring = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self.board = torch.zeros(Board.bytes_for(3), dtype=torch.uint8).share_memory_()

    def transport(self, process: int) -> StagedTransport:
        """To be made in the process, real or a thread, that it is of."""
        memory = NodeMemory(self.ring, Board(self.board, process, ["process 0", "process 1", "process 2"], 20.0))
        slices = self.weights if process == 0 else None
        return StagedTransport(self.parts[process], self.buckets, torch.float32, memory, slices, None)

    def count(self, process: int, column: Column) -> int:
        return int(self.board.view(torch.int64).view(3, len(Column))[process, column])


def transports(bucket_bytes: int) -> tuple[list[StagedTransport], Weights, tuple[Bucket, ...]]:
    """Of process 0, which writes, and of 1 and 2, which read."""
    node = Node(bucket_bytes)
    return [node.transport(process) for process in range(3)], node.weights, node.buckets


def at_the_same_time(*parts: Callable[[], None]) -> None:
    threads = [threading.Thread(target=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("bucket_bytes", [1, 256, 1024, 10**6])
def test_every_reader_gets_each_push_whole_and_unmixed(bucket_bytes: int):
    (writer, *readers), weights, buckets = transports(bucket_bytes)
    for version in (1, 2, 3):
        weights.version = version
        got: list[list[tuple[str, Tensor]]] = [[], []]

        def read(index: int, got: list = got) -> None:
            for name, tensor in readers[index].exchange():
                time.sleep(0.0002 * index)  # writer and first reader are ahead of the second
                got[index].append((name, tensor.clone()))

        at_the_same_time(lambda: list(writer.exchange()), lambda: read(0), lambda: read(1))
        for found in got:
            assert [name for name, _ in found] == [placed.name for bucket in buckets for placed in bucket.tensors]
            for name, tensor in found:
                assert tensor.shape == hf_shapes(SHAPE)[name]
                assert (tensor == weights.value(name)).all(), (name, version)


def test_one_that_gives_up_frees_those_that_wait_for_it():
    (writer, first, second), _, _ = transports(1)
    first.abandon()

    def read() -> None:
        with contextlib.suppress(PeerError):
            list(second.exchange())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with pytest.raises(PeerError, match="process 1 failed before its part of a bucket was done"):
        list(writer.exchange())
    writer.abandon()
    reader.join(30)
    assert not reader.is_alive()


@pytest.mark.parametrize("killed", [0, 1], ids=["writer", "reader"])
def test_a_process_killed_in_the_middle_of_a_push_is_named_by_one_that_waits_for_it(killed: int):
    node = Node(1)

    def dawdle() -> None:
        for _ in node.transport(killed).exchange():
            time.sleep(0.2)

    def kill() -> None:
        while not node.count(killed, Column.RELEASED if killed else Column.WRITTEN):
            time.sleep(0.01)
        peer.kill()
        peer.join()

    def read() -> None:
        with contextlib.suppress(PeerError):
            list(node.transport(2).exchange())

    peer = multiprocessing.get_context("fork").Process(target=dawdle)
    peer.start()
    others = [threading.Thread(target=kill)]
    if killed == 1:  # else process 2 does not come, so that the writer stays in the middle
        others.append(threading.Thread(target=read))
    for other in others:
        other.start()
    survivor = node.transport(1 - killed)
    with pytest.raises(PeerError, match=f"process {killed} died before its part of a bucket was done"):
        list(survivor.exchange())
    survivor.abandon()
    for other in others:
        other.join(30)
    assert peer.exitcode == -signal.SIGKILL
