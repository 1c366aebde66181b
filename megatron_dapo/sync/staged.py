"""Weights by the plan, through memory that hosts share and over a network between hosts: driver and ranks.

The driver makes the plan once and gives each process its part; a push is then one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.parallel import device
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.board import Board
from megatron_dapo.sync.buckets import Bucket, make_buckets
from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.network import Network, open_store
from megatron_dapo.sync.parts import Part, make_parts
from megatron_dapo.sync.plan import Plan
from megatron_dapo.sync.ring import ring_bytes
from megatron_dapo.sync.slices import LocalSlices
from megatron_dapo.sync.stores import Handle, make_cuda_memory, make_host_memory
from megatron_dapo.sync.survey import Ranks, Survey
from megatron_dapo.sync.transport import NodeMemory, StagedTransport, Transport
from megatron_dapo.workers.policy import PolicyWorker
from megatron_dapo.workers.rollout import RolloutWorker

MEMORY: dict[str, Callable[[int], tuple[Tensor, Handle]]] = {"host": make_host_memory, "cuda": make_cuda_memory}


class SharedKeeper:
    """What this process has opened for all: it lives as long as the process does."""

    def __init__(self, memory: Sequence[Tensor], handles: MemoryHandles | None, store: TCPStore | None):
        self.memory, self.handles, self.store = memory, handles, store


class SyncWorker:
    """This process's part of every push."""

    def __init__(self, transport: Transport, has_engine: bool):
        self.transport, self.has_engine = transport, has_engine


@dataclass(frozen=True)
class MemoryWish:
    kind: str  # of MEMORY
    ring_bytes: int
    board_bytes: int


@dataclass(frozen=True)
class MemoryHandles:
    ring: Handle
    board: Handle


@dataclass(frozen=True)
class Wishes:
    """What one process is to make for all."""

    memory: MemoryWish | None
    store_host: str | None
    timeout: float


@dataclass(frozen=True)
class Opened:
    memory: MemoryHandles | None
    port: int  # of the store, where there is one


@dataclass(frozen=True)
class Seat:
    """All that a process needs to take its part in every push."""

    part: Part
    buckets: tuple[Bucket, ...]
    dtype: torch.dtype
    memory: MemoryHandles | None
    store: tuple[str, int] | None  # where network groups meet
    has_policy: bool
    has_engine: bool
    timeout: float


class StagedSync:
    """A `WeightSync`."""

    def __init__(self, ranks: Ranks, plan: Plan, seen: Survey, memory: str, bucket_bytes: int, timeout: float = 600.0):
        """
        Args:
            memory: of MEMORY, where buckets lie.
            timeout: seconds that a process waits for another's part of a bucket.
        """
        self._ranks = ranks
        dtype = {2: torch.bfloat16, 4: torch.float32}[plan.itemsize]
        buckets = make_buckets(hf_shapes(seen.shape), plan.itemsize, bucket_bytes)
        parts = make_parts(plan, buckets, ranks.processes)
        handles, store = self._open(parts, buckets, memory, seen, timeout)
        policy, engines = set(ranks.processes.trainer), set(ranks.processes.engines)
        seats = [
            Seat(
                part=part,
                buckets=buckets,
                dtype=dtype,
                memory=handles.get(part.board),
                store=store,
                has_policy=part.process in policy,
                has_engine=part.process in engines,
                timeout=timeout,
            )
            for part in parts
        ]
        ranks.call(take_seat, seats)
        ranks.call_all(forget_names)

    def push(self, version: int) -> None:
        """Raises WeightSyncError: an engine refused the weights."""
        refused = {n: said for n, said in enumerate(self._ranks.call_all(exchange_weights, version)) if said}
        if refused:
            listed = "; ".join(f"process {process}: {said}" for process, said in refused.items())
            raise WeightSyncError(f"the weights of version {version} were refused by an engine: {listed}")

    def _open(
        self, parts: Sequence[Part], buckets: Sequence[Bucket], kind: str, seen: Survey, timeout: float
    ) -> tuple[dict[tuple[int, ...], MemoryHandles], tuple[str, int] | None]:
        """board -> its node's memory, made by the first reader on it; and the store, opened by process 0."""
        size = ring_bytes([bucket.nbytes for bucket in buckets])
        makers = {part.board[part.readers[0]]: part.board for part in parts if part.board}
        host = "127.0.0.1" if seen.one_host else seen.hosts[0]
        linked = any(part.links for part in parts)
        wishes = [
            Wishes(
                memory=MemoryWish(kind, size, Board.bytes_for(len(makers[n]))) if n in makers else None,
                store_host=host if n == 0 and linked else None,
                timeout=timeout,
            )
            for n in range(len(parts))
        ]
        opened: list[Opened] = self._ranks.call(open_shared, wishes)
        handles = {board: memory for n, board in makers.items() if (memory := opened[n].memory) is not None}
        return handles, (host, opened[0].port) if linked else None


def open_shared(host: WorkerHost, wishes: Wishes) -> Opened:
    """Make what this process makes for all."""
    memory: list[Tensor] = []
    handles, store = None, None
    if (wish := wishes.memory) is not None:
        ring, ring_handle = MEMORY[wish.kind](wish.ring_bytes)
        board, board_handle = make_host_memory(wish.board_bytes)
        memory = [ring, board]
        handles = MemoryHandles(ring_handle, board_handle)
    if wishes.store_host is not None:
        store = open_store((wishes.store_host, 0), wishes.timeout, master=True)
    host.add(SharedKeeper(memory, handles, store))
    return Opened(handles, 0 if store is None else store.port)


def forget_names(host: WorkerHost, _: None) -> None:
    """All have opened what this process made."""
    if (handles := host.get(SharedKeeper).handles) is not None:
        handles.ring.forget_name()
        handles.board.forget_name()


def take_seat(host: WorkerHost, seat: Seat) -> None:
    part = seat.part
    memory = None
    if seat.memory is not None and part.row is not None:
        names = [f"process {process}" for process in part.board]
        board = Board(seat.memory.board.open(), part.row, names, seat.timeout)
        memory = NodeMemory(seat.memory.ring.open(), board)
    network = None
    if part.links:
        assert seat.store is not None
        network = Network(part.links, part.process, open_store(seat.store, seat.timeout), device(), seat.timeout)
    slices = LocalSlices(host.get(PolicyWorker)) if seat.has_policy else None
    transport = StagedTransport(part, seat.buckets, seat.dtype, memory, slices, network)
    host.add(SyncWorker(transport, seat.has_engine))


def exchange_weights(host: WorkerHost, version: int) -> str:
    """This process's part of a push. What its engine says against the weights, or nothing."""
    worker = host.get(SyncWorker)
    refusal = ""
    try:
        arriving = worker.transport.exchange()
        if worker.has_engine:
            try:
                host.get(RolloutWorker).load_weights(arriving, version)
            except ValueError as error:
                refusal = str(error)
        for _ in arriving:  # the others count on this process's part, also where its engine refuses
            pass
    except BaseException:
        worker.transport.abandon()
        raise
    return refusal
