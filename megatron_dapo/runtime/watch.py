"""The driver's watch over the ranks: it hears their heartbeats, finds the one that stalls and ends the run.

In threads of its own, over connections of its own: the main thread may itself be stuck in a collective. When a rank
stalls (`stall.py`), the watch

1. says so on standard error at once;
2. runs the last will, which completes what can be completed of the run's state;
3. has the main thread raise a RankStalledError, by ending the ranks whose collectives may hold it;
4. if it does not, because it stands still itself or waits for a rank that cannot be ended from here, ends the process.

Time that this process did not run itself, because it was stopped or its machine slept, is nobody's silence.
"""

from __future__ import annotations

import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Any

from megatron_dapo.exit_codes import FAILED
from megatron_dapo.runtime.beat import Beat
from megatron_dapo.runtime.group import RankStalledError, WorkerError, WorkerGroup, rank_name
from megatron_dapo.runtime.host import phase_of
from megatron_dapo.runtime.pulse import BEATS_A_LIMIT, ONE_GAP, Answer, AsideCall, WatchAddress
from megatron_dapo.runtime.stall import Elsewhere, Seen, Stall, find_stall, somebody_waits, somebody_works

LONGEST_GRACE = 30.0  # seconds that the main thread gets to raise the error
ASIDE_SECONDS = 600.0  # for a call beside a rank's main thread: it may wait for a checkpoint's files

LastWill = Callable[[WorkerGroup], str]


class Watch:
    """Made where ranks are to be watched; `address` is for their `Pulse`s."""

    def __init__(
        self,
        size: int,
        limit: float,
        fail: Callable[[RankStalledError], threading.Event],
        at_forced_end: Callable[[], None] = lambda: None,
        group: str = "",
        elsewhere: Callable[[], Elsewhere] = Elsewhere,
    ):
        """
        Args:
            limit: seconds that are a stall.
            fail: has the main thread raise the error; the event says that it did.
            at_forced_end: called before the process is ended in its place.
            group: see `rank_name`.
            elsewhere: asked at each look.
        """
        self._size, self._limit, self._fail, self._at_forced_end = size, limit, fail, at_forced_end
        self._group, self._elsewhere = group, elsewhere
        self._key = secrets.token_bytes(32)
        self._listener = Listener(("0.0.0.0", 0), backlog=max(16, size), authkey=self._key)
        self._port = int(self._listener.address[1])
        self._time = 0.0  # seconds that this process has been watching
        self._seen: dict[int, tuple[Beat, float]] = {}  # rank -> its last beat, and when it came
        self._orders: dict[int, queue.SimpleQueue[AsideCall]] = {rank: queue.SimpleQueue() for rank in range(size)}
        self._answers: dict[int, queue.SimpleQueue[Answer]] = {rank: queue.SimpleQueue() for rank in range(size)}
        self._closed = threading.Event()
        self.last_will: LastWill | None = None
        for work in (self._accept, self._patrol):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def address(self, host: str) -> WatchAddress:
        """For ranks that reach this machine under the name `host`."""
        return WatchAddress(host, self._port, self._key, self._limit)

    def somebody_waits(self, or_is_through: bool) -> bool:
        """See `stall.somebody_waits`."""
        return somebody_waits(self._judged(), self._limit, or_is_through)

    def somebody_works(self) -> bool:
        """Whether a call is under way on a rank."""
        return somebody_works(self._judged())

    def close(self) -> None:
        """Ranks may leave now."""
        self._closed.set()

    def call_aside(self, rank: int, call: AsideCall) -> Callable[[], Any]:
        """Have a rank make a call beside its main thread; the function returned waits for what it gives.

        Raises:
            WorkerError: (the function) it failed, or did not answer.
        """
        self._orders[rank].put(call)

        def wait() -> Any:
            try:
                answer = self._answers[rank].get(timeout=ASIDE_SECONDS)
            except queue.Empty:
                raise WorkerError(rank, phase_of(call.function), f"no answer for {ASIDE_SECONDS:g} s") from None
            if answer.error:
                raise WorkerError(rank, phase_of(call.function), answer.error)
            return answer.value

        return wait

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, OSError):  # a stranger, or a rank that is gone already
                continue
            threading.Thread(target=self._attend, args=(connection,), name="watch", daemon=True).start()

    def _attend(self, connection: Connection) -> None:
        rank = None
        try:
            while True:
                message = connection.recv()
                if isinstance(message, Answer):
                    assert rank is not None
                    self._answers[rank].put(message)
                    continue
                rank = message.rank
                self._seen[rank] = message, self._time
                orders = self._orders[rank]
                connection.send(None if orders.empty() else orders.get())
        except (EOFError, OSError):  # it has ended, and the control plane acts on that
            if rank is not None:
                del self._seen[rank]

    def _patrol(self) -> None:
        interval = self._limit / BEATS_A_LIMIT / 2
        before = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            self._time += min(now - before, ONE_GAP * self._limit)
            before = now
            stall = find_stall(self._judged(), self._limit, self._elsewhere())
            if stall is not None:
                self._end(stall)
                return

    def _judged(self) -> dict[int, Seen]:
        return {rank: Seen(beat, self._time - at) for rank, (beat, at) in list(self._seen.items())}

    def _end(self, stall: Stall) -> None:
        told = stall.told(rank_name(stall.beat.rank, self._group))
        _say(f"megatron-dapo: {told.splitlines()[0]}\nmegatron-dapo: ending the run")
        error = RankStalledError(stall.beat.rank, stall.beat.phase, f"{told}\n{self._what_is_saved(stall)}")
        taken = self._fail(error)
        if taken.wait(min(LONGEST_GRACE, self._limit)) or self._closed.is_set():
            return
        _say(f"megatron-dapo: {type(error).__name__}: {error}")
        self._at_forced_end()
        os._exit(FAILED)

    def _what_is_saved(self, stall: Stall) -> str:
        if self.last_will is None:
            return ""
        unheard = stall.beat.rank if stall.silent else None
        try:
            return self.last_will(AsideGroup(self, self._size, unheard))
        except Exception as error:  # the run must end all the same
            return f"What is saved could not be found out: {type(error).__name__}: {error}"


class AsideGroup:
    """A `WorkerGroup` whose calls run beside the main threads of the ranks. For the last will alone."""

    def __init__(self, watch: Watch, size: int, unheard: int | None):
        """`unheard`: a rank that does not answer."""
        self.size = size
        self._watch, self._unheard = watch, unheard

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> AsideHandle:
        """Raises WorkerError: a rank cannot be heard."""
        if self._unheard is not None:
            raise WorkerError(self._unheard, phase_of(method), "it does not answer")
        return AsideHandle(
            [self._watch.call_aside(rank, AsideCall(method, shard)) for rank, shard in enumerate(shards)]
        )

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        """start(...).result()"""
        return self.start(method, shards).result()

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        """The same argument on every rank."""
        return self.call(method, [argument] * self.size)

    def on_stall(self, last_will: LastWill) -> None:
        """Nothing: the stall is there."""


class AsideHandle:
    """A call under way; values come when all of a rank's are there."""

    def __init__(self, waits: Sequence[Callable[[], Any]]):
        self._waits = waits

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(rank, what `result` holds for it)."""
        yield from enumerate(self.result())

    def result(self) -> list[Any]:
        """[rank] -> the returned value, or the list of yielded ones."""
        return [wait() for wait in self._waits]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
