"""Messages between two ranks, over a gloo process group that nothing else uses.

A message is a kind and a pickled payload. Arrays of `APART_BYTES` and more travel beside the pickle (protocol 5):
read from where they lie, received into the memory in which the receiver keeps them.

The group is made directly from the launcher's store. So it does not need the model's process groups to be there,
and survives them. Its waits have no time-out: in gloo a wait that times out breaks every connection of the group.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import DistStoreError, ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

APART_BYTES = 1 << 16
FOREVER = timedelta(days=3650)

Bytes = NDArray[np.uint8]


class Kind(IntEnum):
    CALL = 0  # driver -> worker: (function, argument)
    STOP = 1  # leave `serve`
    RECEIVED = 2  # the driver has the report of a failure
    BEGIN = 3  # worker -> driver: the phase that begins
    ITEM = 4  # one value
    DONE = 5  # no more values
    FAILED = 6  # (phase, traceback); the worker leaves
    GOODBYE = 7  # the worker has left `serve` as it was told
    CLOSED = 8  # never sent: what a broken connection reads as
    WATCH = 9  # driver -> worker, once: where heartbeats go


@dataclass(frozen=True)
class Message:
    kind: Kind
    frame: Any = b""  # bytes, or Bytes where it was received
    apart: Sequence[Bytes] = field(default=())

    @staticmethod
    def of(kind: Kind, payload: Any) -> Message:
        """Raises whatever pickle raises for a payload that cannot travel."""
        apart: list[Bytes] = []

        def keep_inside(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < APART_BYTES:
                return True
            apart.append(_writable(raw))
            return False

        frame = pickle.dumps(payload, protocol=5, buffer_callback=keep_inside)
        return Message(kind, frame, apart)

    def load(self) -> Any:
        return pickle.loads(self.frame, buffers=self.apart)


class Link:
    """The connection to one other rank. Any thread may send; one thread receives."""

    def __init__(self, gloo: ProcessGroupGloo, peer: int):
        self.peer = peer
        self._gloo: Any = gloo  # torch's stubs leave out its send and recv
        self._sending = threading.Lock()

    def post(self, message: Message) -> list[Work]:
        """Begin to send. The arrays of the message must not change before `wait` has returned for each of these.

        Raises:
            RuntimeError: the connection is broken.
        """
        parts = [_writable(part) for part in (message.frame, *message.apart) if len(part)]
        sizes = [len(part) for part in message.apart]
        header = np.array([message.kind, len(message.frame), len(sizes)], np.int64)
        arrays = [header, np.array(sizes, np.int64), *parts] if sizes else [header, *parts]
        with self._sending:
            return [self._gloo.send([torch.from_numpy(array)], self.peer, 0) for array in arrays]

    def send(self, message: Message, timeout: timedelta = FOREVER) -> None:
        """Returns when the peer has begun to take the last part: it has to be receiving.

        Raises:
            RuntimeError: the connection is broken, or was not ready in time and is broken now.
        """
        for work in self.post(message):
            work.wait(timeout)

    def receive(self) -> Message:
        """Wait for the next message. A broken connection gives one of kind CLOSED."""
        try:
            kind, frame_size, count = self._receive(np.empty(3, np.int64)).tolist()
            sizes = self._receive(np.empty(count, np.int64)) if count else ()
            frame = self._receive(np.empty(frame_size, np.uint8)) if frame_size else b""
            return Message(Kind(kind), frame, [self._receive(np.empty(size, np.uint8)) for size in sizes])
        except RuntimeError:  # gloo has no narrower type
            return Message(Kind.CLOSED)

    def _receive(self, array: NDArray[Any]) -> NDArray[Any]:
        self._gloo.recv([torch.from_numpy(array)], self.peer, 0).wait(FOREVER)
        return array


def connect(rank: int, size: int, seconds: float) -> list[Link]:
    """Links from rank 0 to each other rank, and from each to rank 0. Every rank calls it.

    Raises:
        TimeoutError: a rank did not come within `seconds`.
    """
    timeout = timedelta(seconds=seconds)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore("megatron_dapo/control", store)
    meet(store, rank, size, timeout)
    gloo = ProcessGroupGloo(store, rank, size, timeout)
    return [Link(gloo, peer) for peer in (range(1, size) if rank == 0 else (0,))]


def meet(store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """Wait until every rank is there.

    Raises:
        TimeoutError: names the ranks that did not come.
    """
    keys = [f"rank {other}" for other in range(size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timeout)
    except DistStoreError as error:
        missing = ", ".join(key for key in keys if not store.check([key]))
        raise TimeoutError(
            f"{missing} did not start within {timeout.total_seconds():g} s, wanted {size} ranks; see its log, "
            f"and that MASTER_ADDR and MASTER_PORT can be reached from there"
        ) from error


def _writable(raw: Any) -> Bytes:
    """The bytes as an array that torch can take: a copy only where they are read-only."""
    array = np.frombuffer(raw, np.uint8)
    return array if array.flags.writeable else array.copy()
