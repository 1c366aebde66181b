"""A rank's heartbeat: a thread with a connection of its own to the driver's watch.

It beats while the main thread works, sleeps or is stuck in a collective. Each beat is answered: mostly with nothing,
at the end of a run that stalled with calls to be made here, beside the main thread (`AsideCall`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

from megatron_dapo.progress import PROGRESS
from megatron_dapo.runtime.beat import Sampler
from megatron_dapo.runtime.host import WorkerHost, streams

BEATS_A_LIMIT = 15  # so that a stall is seen at most two of these after it is one
STACK_FROM = 0.5  # of the limit
ONE_GAP = 0.3  # of the limit: what one pause between two looks counts at most, for in a longer one nothing ran


@dataclass(frozen=True)
class WatchAddress:
    """Where the watch listens. `key` proves to each side that the other belongs to the same run."""

    host: str
    port: int
    key: bytes
    limit: float  # seconds that are a stall


@dataclass(frozen=True)
class AsideCall:
    function: Callable[..., Any]
    argument: Any


@dataclass(frozen=True)
class Answer:
    """What an AsideCall returned, or why it did not."""

    value: Any
    error: str


class Pulse:
    """`host` gives this rank's workers, once it has any. `driver_is_silent` is called, in the thread, when the driver
    has not answered a beat for the limit; then the thread goes on waiting."""

    def __init__(
        self,
        rank: int,
        address: WatchAddress,
        host: Callable[[], WorkerHost | None],
        driver_is_silent: Callable[[float], None] = lambda seconds: None,
    ):
        self._address, self._host, self._driver_is_silent = address, host, driver_is_silent
        self._interval = address.limit / BEATS_A_LIMIT
        self._sampler = Sampler(rank, PROGRESS, ONE_GAP * address.limit, STACK_FROM * address.limit)
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        try:
            with Client((self._address.host, self._address.port), authkey=self._address.key) as connection:
                while True:
                    connection.send(self._sampler.beat())
                    call = self._answered(connection)
                    if call is None:
                        time.sleep(self._interval)
                    else:
                        connection.send(self._make(call))
        except (EOFError, OSError):
            return  # the driver has left; the control plane acts on that

    def _answered(self, connection: Connection) -> AsideCall | None:
        polls = 0
        while not connection.poll(self._interval):
            polls += 1  # not by the clock: it goes on while this process is stopped
            if polls == BEATS_A_LIMIT:
                self._driver_is_silent(self._address.limit)
        return connection.recv()

    def _make(self, call: AsideCall) -> Answer:
        host = self._host()
        if host is None:
            return Answer(None, "this rank has no workers yet")
        try:
            result = call.function(host.receiver(call.function), call.argument)
            return Answer(list(result) if streams(call.function) else result, "")
        except Exception as error:
            return Answer(None, f"{type(error).__name__}: {error}")
