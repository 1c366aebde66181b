"""Who has written and who has released how many buckets: counters in shared memory, one row a process.

Processes of a host keep in step by it without a server, a collective or a lock: each writes its own row alone. A
process that waits sees at once that another has failed, and within a second that it has died.

An aligned 64-bit store is atomic, and the interpreter's own locks order it after the copies before it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from megatron_dapo.progress import PROGRESS

# Seconds. The longer a wait lasts the less often it looks: that takes CPU time from those that are waited for.
_SHORTEST_NAP, _LONGEST_NAP, _GROWTH = 2e-5, 1e-3, 1.25
_LOOK_AROUND = 1.0  # seconds between looks at whether the others live


class Column(IntEnum):
    WRITTEN = 0  # buckets, over all pushes
    RELEASED = 1
    FAILED = 2
    PID = 3


class PeerError(RuntimeError):
    """Another process of the host failed, died or did not come in time: names it and what was waited for."""


class Board:
    def __init__(self, memory: Tensor, row: int, names: Sequence[str], timeout: float):
        """
        Args:
            memory: [bytes_for(len(names))] uint8, zeros at first, shared by all.
            row: this process's place in `names`.
            timeout: seconds of waiting for a peer that lives.
        """
        self._cells = memory.view(torch.int64).view(len(names), len(Column)).numpy()
        self._row, self._names, self._timeout = row, names, timeout
        self._cells[row, Column.PID] = os.getpid()

    @staticmethod
    def bytes_for(processes: int) -> int:
        return 8 * len(Column) * processes

    def set(self, column: Column, count: int) -> None:
        self._cells[self._row, column] = count

    def fail(self) -> None:
        self._cells[self._row, Column.FAILED] = 1

    def wait(self, rows: Sequence[int], column: Column, least: int) -> None:
        """Until the counters of all `rows` are at `least`.

        Raises:
            PeerError: see there.
        """
        with PROGRESS.waiting("a bucket of weights"):
            self._wait(rows, column, least)

    def _wait(self, rows: Sequence[int], column: Column, least: int) -> None:
        start = time.monotonic()
        nap, look = _SHORTEST_NAP, start + _LOOK_AROUND
        while late := [row for row in rows if self._cells[row, column] < least]:
            self._raise_if(late, lambda row: bool(self._cells[row, Column.FAILED]), "failed")
            now = time.monotonic()
            if now > look:
                look = now + _LOOK_AROUND
                self._raise_if(late, self._is_dead, "died")
            if now - start > self._timeout:
                self._raise_if(late, lambda row: True, f"was waited for during {self._timeout:g} s")
            time.sleep(nap)
            nap = min(_GROWTH * nap, _LONGEST_NAP)

    def _raise_if(self, rows: Sequence[int], bad: Callable[[int], bool], what: str) -> None:
        named = [self._names[row] for row in rows if bad(row)]
        if named:
            raise PeerError(f"weight sync: {', '.join(named)} {what} before its part of a bucket was done")

    def _is_dead(self, row: int) -> bool:
        pid = int(self._cells[row, Column.PID])
        if pid == 0:  # has not opened the board yet
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False
