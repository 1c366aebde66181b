"""The driver's end of the control plane: what the other ranks send, and which of them failed first.

What is left out: the driver's own part of a call (`spmd.py`), and killing a rank that hangs, which its launcher does.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Work

from megatron_dapo.progress import IDLE, START_UP
from megatron_dapo.runtime.group import RankStalledError, WorkerError
from megatron_dapo.runtime.link import Kind, Link, Message
from megatron_dapo.runtime.pulse import WatchAddress
from megatron_dapo.runtime.serving import LEAVE_SECONDS

ECHO_SECONDS = 1.0  # by which the news of a death may come after the errors that the death caused


class Hub:
    """Links to all other ranks, each with a thread that receives. Of a group of one, it has none.

    `busy` is the phase of the call under way, if there is one.
    """

    def __init__(self, links: Sequence[Link], timeout: float):
        self.links = {link.peer: link for link in links}
        self.busy: str | None = None
        self._timeout = timeout
        self._inbox: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._ended: dict[int, Message] = {}  # rank -> its last message, in order of arrival
        self._phases = dict.fromkeys(self.links, START_UP)
        self._stall: RankStalledError | None = None
        self._stall_is_raised = threading.Event()
        self._threads = [threading.Thread(target=self._listen, args=(link,), daemon=True) for link in links]
        for thread in self._threads:
            thread.start()

    def tell_where_to_beat(self, address: WatchAddress) -> None:
        """Before the first call."""
        message = Message.of(Kind.WATCH, address)
        self._greetings = [link.post(message) for link in self.links.values()]  # kept while they are under way

    def fail(self, stall: RankStalledError) -> threading.Event:
        """Let the driver raise `stall` at its next call, or where it waits now, and tell all ranks to leave: that
        breaks the collectives in which it may be stuck. From any thread. The event says that it is being raised."""
        self._stall = stall
        self._farewells = self._tell_to_leave()
        self._inbox.put((stall.rank, Message(Kind.CLOSED)))
        return self._stall_is_raised

    def send(self, function: Callable[..., Any], shards: Sequence[Any]) -> None:
        """Give each rank its shard, `shards[rank]`. What cannot be pickled is found before anything is sent.

        Raises:
            WorkerError: a rank has failed, or does not take its shard.
        """
        self.check()
        messages: dict[int, Message] = {}  # by the identity of the shard: one that goes to all is pickled once
        for rank in self.links:
            if id(shards[rank]) not in messages:
                messages[id(shards[rank])] = Message.of(Kind.CALL, (function, shards[rank]))
        try:
            posted = {rank: link.post(messages[id(shards[rank])]) for rank, link in self.links.items()}
            for rank, works in posted.items():
                self._deliver(rank, works)
        except RuntimeError as error:
            if not isinstance(error, WorkerError) and (failure := self.failure()):
                raise failure from error
            raise

    def receive(self, waiting: Collection[int]) -> tuple[int, Message]:
        """The next (rank, ITEM or DONE) to arrive.

        Raises:
            WorkerError: a rank failed, or nothing came from the ranks `waiting` for as long as the time-out.
        """
        try:
            rank, message = self._inbox.get(timeout=self._timeout)
        except queue.Empty:
            raise self._silence(waiting) from None
        self.check()
        return rank, message

    @property
    def has_news(self) -> bool:
        return not self._inbox.empty()

    def check(self) -> None:
        """Raises WorkerError: a rank has failed or stalled."""
        if (self._ended or self._stall) and (failure := self.failure()):
            raise failure

    def failure(self) -> WorkerError | None:
        """What went wrong first on another rank, if anything did; it waits for news of a death.

        Errors spread: a rank that dies breaks the collectives of its peers, and their reports may come before the
        end of its connection. A death without a report is therefore put first, and then the first report: a rank
        reports before it breaks anything. A stall goes before both: it was found out, and all ranks were ended for it.
        """
        if self._stall is not None:
            self._stall_is_raised.set()
            return self._stall
        deadline = time.monotonic() + ECHO_SECONDS
        while self.links and not self._deaths() and time.monotonic() < deadline:
            time.sleep(0.01)
        for rank in self._deaths():
            why = "died without a report: its connection closed. See its log, and the kernel's if memory ran out"
            return WorkerError(rank, self._phases[rank], f"rank {rank} {why}")
        for rank, message in list(self._ended.items()):
            if message.kind is Kind.FAILED:
                phase, trace = message.load()
                return WorkerError(rank, phase, trace + self.still_at_work())
        return None

    def still_at_work(self) -> str:
        """A line for an error message: the ranks that neither failed nor finished. One that hangs is among them."""
        busy = [rank for rank, phase in self._phases.items() if phase != IDLE and rank not in self._ended]
        return f"Still at work: {self._names(busy)}\n" if busy else ""

    def stop(self) -> None:
        """Tell all ranks to leave, and wait until they have; one that hangs is not waited for."""
        posted = self._tell_to_leave()
        deadline = time.monotonic() + LEAVE_SECONDS + 1
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        del posted

    def _tell_to_leave(self) -> list[list[Work]]:
        """What has been posted, to be kept while it is under way."""
        posted = []
        for rank in [rank for rank in self.links if rank not in self._ended]:
            with contextlib.suppress(RuntimeError):  # it closed just now: it needs no word
                posted.append(self.links[rank].post(Message(Kind.STOP)))
        return posted

    def _deliver(self, rank: int, works: Sequence[Work]) -> None:
        begun = time.monotonic()
        try:
            for work in works:
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            if time.monotonic() - begun < self._timeout:
                raise
            raise self._silence([rank]) from error

    def _listen(self, link: Link) -> None:
        while True:
            message = link.receive()
            if message.kind is Kind.BEGIN:
                self._phases[link.peer] = message.load()
                continue
            if message.kind is Kind.DONE:
                self._phases[link.peer] = IDLE
            if message.kind in (Kind.FAILED, Kind.GOODBYE, Kind.CLOSED):
                self._ended[link.peer] = message
            self._inbox.put((link.peer, message))
            if message.kind is Kind.FAILED:
                with contextlib.suppress(RuntimeError):  # its report is here; that it is gone changes nothing
                    link.send(Message(Kind.RECEIVED))
            if link.peer in self._ended:
                return

    def _deaths(self) -> list[int]:
        return [rank for rank, message in list(self._ended.items()) if message.kind is Kind.CLOSED]

    def _silence(self, waiting: Collection[int]) -> WorkerError:
        why = f"no answer for {self._timeout:g} s from {self._names(waiting)}"
        first = min(waiting)
        return WorkerError(first, self._phases[first], f"{why}. If it is only slow, connect with a longer time-out")

    def _names(self, ranks: Collection[int]) -> str:
        return ", ".join(f"rank {rank} (in {self._phases[rank]})" for rank in sorted(ranks))
