"""One writer and two readers on threads, through a small ring: order, what stays valid, and what failing does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from itertools import groupby

import pytest
import torch
from torch import Tensor

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.sync.board import Board, PeerError
from megatron_dapo.sync.buckets import Bucket, make_buckets
from megatron_dapo.sync.parts import Processes, make_parts
from megatron_dapo.sync.plan import EngineRank, Topology, make_plan, megatron_ranks
from megatron_dapo.sync.regions import Region
from megatron_dapo.sync.transport import SLOTS, NodeMemory, StagedTransport
from tests.unit.sync.layouts import model_shape

SHAPE = model_shape()


class Weights:
    """Stands for a rank that holds the model: every element of a push is that push's number."""

    def __init__(self) -> None:
        self.version = 0

    def view(self, region: Region) -> Tensor:
        dims = len(hf_shapes(SHAPE)[region.name])
        return torch.full([s.stop - s.start for s in region.index(dims)], float(self.version))


def transports(bucket_bytes: int) -> tuple[list[StagedTransport], Weights, tuple[Bucket, ...]]:
    """Of process 0, which writes, and of 1 and 2, which read."""
    engines = (EngineRank(0, 0, 1, 0), EngineRank(1, 0, 1, 0))
    plan = make_plan(SHAPE, Topology(megatron_ranks(1, 1, [0]), engines, 1, 1), 4)
    buckets = make_buckets(hf_shapes(SHAPE), 4, bucket_bytes)
    parts = make_parts(plan, buckets, Processes((0,), (1, 2)))
    largest = max(bucket.nbytes for bucket in buckets)
    slots = [torch.zeros(largest, dtype=torch.uint8) for _ in range(min(SLOTS, len(buckets)))]
    board, weights = torch.zeros(Board.bytes_for(3), dtype=torch.uint8), Weights()
    made = []
    for part in parts:
        memory = NodeMemory(slots, Board(board, part.process, ["process 0", "process 1", "process 2"], 20.0))
        made.append(StagedTransport(part, buckets, torch.float32, memory, weights if not part.process else None, None))
    return made, weights, buckets


def at_the_same_time(*parts: Callable[[], None]) -> None:
    threads = [threading.Thread(target=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def whole_buckets(tensors: Iterable[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
    """As an engine collects them that hands on a bucket at a time; copied only when the next one has begun."""
    found = []
    for _, bucket in groupby(tensors, key=lambda item: item[1].untyped_storage().data_ptr()):
        collected = list(bucket)
        found.append({name: tensor.clone() for name, tensor in collected})
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 256, 1024, 10**6])
def test_every_reader_gets_each_push_whole_and_unmixed(bucket_bytes: int):
    (writer, *readers), weights, buckets = transports(bucket_bytes)
    for version in (1, 2, 3):
        weights.version = version
        got: list[list[dict[str, Tensor]]] = [[], []]

        def read(index: int, got: list = got) -> None:
            got[index] = whole_buckets(readers[index].exchange())

        at_the_same_time(lambda: list(writer.exchange()), lambda: read(0), lambda: read(1))
        for found in got:
            assert [list(bucket) for bucket in found] == [[p.name for p in bucket.tensors] for bucket in buckets]
            for bucket in found:
                for name, tensor in bucket.items():
                    assert tensor.shape == hf_shapes(SHAPE)[name]
                    assert (tensor == version).all(), (name, version)


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
