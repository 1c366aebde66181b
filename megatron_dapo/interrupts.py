"""Ctrl-C, SIGTERM and SIGUSR1 that lose nothing: noted, and acted on where the state is whole.

SIGTERM and SIGUSR1 are how schedulers announce a preemption. A second Ctrl-C acts at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_dapo.exit_codes import REQUEUE

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
SAME_PRESS = 1.0  # seconds: torchrun passes a Ctrl-C on to ranks that the terminal has sent it to already


class Interrupts:
    """Whether somebody wants the run to stop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested: int | None = None  # the first signal's number
        self._clock, self._since = clock, 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGUSR1 over while inside. Main thread only."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, *PREEMPTIONS)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """If a stop was asked for, raise KeyboardInterrupt, or SystemExit(REQUEUE) for SIGTERM and SIGUSR1.

        Call it where nothing is half done.
        """
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested in PREEMPTIONS:
            raise SystemExit(REQUEUE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = number, self._clock()
        elif number == self.requested == signal.SIGINT and self._clock() - self._since > SAME_PRESS:
            raise KeyboardInterrupt
