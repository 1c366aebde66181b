"""SPMD under torchrun, without a scheduler: rank 0 drives and works, the other ranks do as it says.

    with SpmdControl.connect() as control:
        host = WorkerHost()
        host.add(PolicyWorker(settings))  # on every rank
        if control.is_driver:
            train(control.group(host))
        else:
            control.serve(host)

A process that torchrun did not start is a group of one: nothing is connected, sent or pickled.

When a rank fails, in the call, in `serve` or before, the driver raises a `WorkerError` that names it; also where
the driver itself was in a collective that the failure broke. However the driver leaves the block, the others leave too.
With `stall_seconds` a rank that stands still while others wait for it is a `RankStalledError` (`watch.py`).
Signals are the driver's: Ctrl-C, SIGTERM and SIGUSR1 do nothing on the other ranks, and on the driver SIGTERM and
SIGUSR1 become `SystemExit(REQUEUE)`, so that it can still save, or say which rank's death made torchrun send it.

What is left out: the model's own process groups (`mcore.parallel`); recovery: a group with a failed rank is done for.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any

from megatron_dapo.exit_codes import REQUEUE
from megatron_dapo.progress import IDLE, PROGRESS
from megatron_dapo.runtime.group import WorkerError
from megatron_dapo.runtime.handle import CallHandle, check_start
from megatron_dapo.runtime.host import WorkerHost, phase_of
from megatron_dapo.runtime.hub import Hub
from megatron_dapo.runtime.link import Kind, connect
from megatron_dapo.runtime.pulse import Pulse
from megatron_dapo.runtime.serving import Server
from megatron_dapo.runtime.watch import LastWill, Watch

CONNECT_SECONDS = 600.0
_PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)


class SpmdControl:
    """This process's place among the ranks. Made by `connect`, used as a context."""

    def __init__(self, rank: int, size: int, hub: Hub | None, server: Server | None):
        self.rank, self.size = rank, size
        self._hub, self._server = hub, server
        self._host: WorkerHost | None = None
        self._watch: Watch | None = None

    @classmethod
    def connect(
        cls,
        timeout: float = 1800.0,
        stall_seconds: float | None = None,
        at_forced_end: Callable[[], None] = lambda: None,
    ) -> SpmdControl:
        """Join the other ranks, from the main thread. Reads the environment variables that torchrun sets.

        Args:
            timeout: seconds that the driver, its own part of a call done, waits without hearing from any rank.
            stall_seconds: for which a rank may stand still while others wait for it; None: nobody looks.
            at_forced_end: called on the driver before a stall ends its process, where nothing else can.

        Raises:
            TimeoutError: a rank did not come.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(rank, size, Hub([], timeout), None)
        if rank == 0:
            hub = Hub(connect(rank, size, CONNECT_SECONDS), timeout)
            control = cls(rank, size, hub, None)
            if stall_seconds is not None:
                control._begin_watch(hub, stall_seconds, at_forced_end)
            for number in _PREEMPTIONS:
                signal.signal(number, _terminate)
        else:
            control = cls(rank, size, None, Server(rank, *connect(rank, size, CONNECT_SECONDS)))
            for number in (signal.SIGINT, *_PREEMPTIONS):
                signal.signal(number, _leave_to_the_driver)
        return control

    @property
    def is_driver(self) -> bool:
        return self._hub is not None

    def group(self, host: WorkerHost) -> SpmdGroup:
        """The workers of all ranks; `host` holds those of the driver's own process. On the driver only."""
        if self._hub is None:
            raise RuntimeError(f"rank {self.rank} cannot drive; it should serve")
        self._host = host
        PROGRESS.enter(IDLE)
        return SpmdGroup(host, self._hub, self._watch)

    def serve(self, host: WorkerHost) -> None:
        """Do what the driver asks of this rank's workers until it leaves. Not on the driver."""
        if self._server is None:
            raise RuntimeError("rank 0 cannot serve; it should drive")
        self._server.serve(host)

    def __enter__(self) -> SpmdControl:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._server is not None:
            if error is not None:
                self._server.give_up("".join(traceback.format_exception(error)))
            self._server.leave()
        elif self._hub is not None and self._hub.links:
            if self._watch is not None:
                self._watch.close()
            self._leave(self._hub, error)

    def _begin_watch(self, hub: Hub, seconds: float, at_forced_end: Callable[[], None]) -> None:
        """MASTER_ADDR is the host of rank 0, so the other ranks reach the watch there."""
        self._watch = Watch(self.size, seconds, hub.fail, at_forced_end)
        address = self._watch.address(os.environ["MASTER_ADDR"])
        hub.tell_where_to_beat(address)
        Pulse(0, replace(address, host="127.0.0.1"), lambda: self._host)

    def _leave(self, hub: Hub, error: BaseException | None) -> None:
        for number in _PREEMPTIONS:
            signal.signal(number, _leave_to_the_driver)  # it is on its way out already
        try:
            if error is None:
                hub.check()
            elif _may_be_an_echo(error) and (failure := hub.failure()):
                raise failure from error
        finally:
            hub.stop()
        if error is None:
            for number in _PREEMPTIONS:
                signal.signal(number, signal.SIG_DFL)


class SpmdGroup:
    """A `WorkerGroup` over the ranks of an `SpmdControl`. All groups of one control take turns: one call at a time."""

    def __init__(self, host: WorkerHost, hub: Hub, watch: Watch | None = None):
        self.size = len(hub.links) + 1
        self._host, self._hub, self._watch = host, hub, watch

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> CallHandle:
        """Other ranks begin at once, this one when the handle is iterated or its result asked for. After each item of
        this rank's own come those that arrived meanwhile.

        Raises:
            ValueError: len(shards) is not `size`.
            TypeError, LookupError: the method belongs to no worker here (`WorkerHost.stream`).
            RuntimeError: the call before this one was not finished.
            WorkerError: a rank has failed.
        """
        check_start(method, shards, self.size, self._hub.busy)
        self._host.receiver(method)
        self._hub.send(method, shards)
        self._hub.busy = phase_of(method)
        return CallHandle(self.size, method, self._arrivals(method, shards[0]))

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        """start(...).result()"""
        return self.start(method, shards).result()

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        """The same argument on every rank; it is pickled once."""
        return self.call(method, [argument] * self.size)

    def on_stall(self, last_will: LastWill) -> None:
        """See `WorkerGroup.on_stall`."""
        if self._watch is not None:
            self._watch.last_will = last_will

    def _arrivals(self, method: Callable[..., Any], shard: Any) -> Iterator[tuple[int, Any]]:
        waiting = set(self._hub.links)
        for item in self._own(method, shard):
            yield 0, item
            while waiting and self._hub.has_news:
                yield from self._next(waiting)
        while waiting:
            yield from self._next(waiting)
        self._hub.busy = None

    def _next(self, waiting: set[int]) -> Iterator[tuple[int, Any]]:
        rank, message = self._hub.receive(waiting)
        if message.kind is Kind.DONE:
            waiting.discard(rank)
        else:
            yield rank, message.load()

    def _own(self, method: Callable[..., Any], shard: Any) -> Iterator[Any]:
        try:
            yield from self._host.stream(method, shard)
        except Exception as error:
            if _may_be_an_echo(error) and (failure := self._hub.failure()):
                raise failure from error
            trace = traceback.format_exc() + self._hub.still_at_work()
            raise WorkerError(0, self._host.phase, trace) from error


def _may_be_an_echo(error: BaseException) -> bool:
    """Whether another rank's failure may have caused it: a broken collective, or torchrun ending all ranks."""
    if isinstance(error, SystemExit):
        return error.code == REQUEUE
    return isinstance(error, RuntimeError) and not isinstance(error, WorkerError)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(REQUEUE)


def _leave_to_the_driver(number: int, frame: FrameType | None) -> None:
    """A signal that is not this rank's to act on. A handler, since an ignored signal is ignored by child processes."""
