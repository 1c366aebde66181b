"""The ranks that do as they are told: rank 1 and up.

A thread takes what the driver sends, so that the driver never waits to be heard and a rank that is stuck still
leaves. A rank that fails tells the driver why and then ends its process at once, without the interpreter's own
shutdown: gloo's connections stay open as long as anything refers to a process group, so nothing short of the end of
the process frees peers that wait in a collective; and that shutdown may itself wait for peers. Its exit status is 0
once the driver has the report: the failure is then the driver's to raise, and torchrun, which ends all ranks as soon
as one exits otherwise, leaves it the time.

What is left out: an NCCL collective within a node may outlive its peer; there NCCL's own time-out ends it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import traceback
from datetime import timedelta
from typing import NoReturn

from megatron_dapo.progress import IDLE, PROGRESS, START_UP
from megatron_dapo.runtime.host import WorkerHost, phase_of
from megatron_dapo.runtime.link import Kind, Link, Message
from megatron_dapo.runtime.pulse import Pulse, WatchAddress

READING = "the reading of a call"
LEAVE_SECONDS = 2.0  # for what runs when the driver has gone, or said to leave
REPORT_TIMEOUT = timedelta(seconds=30)  # for the driver to take a report


class Server:
    """A rank's end of the control plane."""

    def __init__(self, rank: int, link: Link):
        self._rank, self._name = rank, f"rank {rank}"
        self._link = link
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._phase = START_UP
        self._host: WorkerHost | None = None
        self._left = threading.Event()
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def serve(self, host: WorkerHost) -> None:
        """Do what the driver asks until it says to leave. A failure, or the driver's end, ends the process."""
        self._host = host
        PROGRESS.enter(IDLE)
        while (message := self._inbox.get()).kind is Kind.CALL:
            try:
                self._answer(host, message)
            except BaseException:
                self.give_up(traceback.format_exc())
        if message.kind is Kind.CLOSED:
            self._end(1, "the driver ended without a word; see the log of rank 0")
        self._left.set()
        with contextlib.suppress(RuntimeError):  # the driver did not wait for it
            self._link.send(Message(Kind.GOODBYE))

    def give_up(self, why: str) -> NoReturn:
        """Report a failure to the driver and end the process."""
        message = Message.of(Kind.FAILED, (self._phase, why))
        try:
            self._link.send(message, REPORT_TIMEOUT)
            acknowledged = self._inbox.get(timeout=REPORT_TIMEOUT.total_seconds()).kind is not Kind.CLOSED
        except (RuntimeError, queue.Empty):
            acknowledged = False
        self._end(0 if acknowledged else 1, f"failed in {self._phase}:\n{why}")

    def leave(self) -> None:
        """This rank is through without having been told so."""
        self._left.set()

    def _answer(self, host: WorkerHost, message: Message) -> None:
        self._phase = READING
        function, argument = message.load()
        self._phase = phase_of(function)
        self._link.send(Message.of(Kind.BEGIN, self._phase))
        for item in host.stream(function, argument):
            self._link.send(Message.of(Kind.ITEM, item))
        self._phase = IDLE
        self._link.send(Message(Kind.DONE))

    def _listen(self) -> None:
        while True:
            message = self._link.receive()
            if message.kind is Kind.WATCH:
                self._beat(message.load())
                continue
            self._inbox.put(message)
            if message.kind in (Kind.STOP, Kind.CLOSED):
                break
        if not self._left.wait(LEAVE_SECONDS):
            told = message.kind is Kind.STOP
            event = "the driver said to leave" if told else "the driver's connection closed"
            self._end(0 if told else 1, f"still in {self._phase} {LEAVE_SECONDS:g} s after {event}; ending it")

    def _beat(self, address: WatchAddress) -> None:
        def driver_is_silent(seconds: float) -> None:
            why = f"rank 0, the driver, has not answered for {seconds:g} s: it is stopped or gone"
            self._end(1, f"{why}; ending the run. In {self._phase} here")

        Pulse(self._rank, address, lambda: self._host, driver_is_silent)

    def _end(self, status: int, why: str) -> NoReturn:
        print(f"{self._name}: {why}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
