"""How far this process has come in what it is asked to do. Others ask, from a thread beside the one that works.

The work says so where it goes by: `PROGRESS.step("micro-batch 3 of 8")`. A place that waits for other ranks without
torch.distributed says for whom (`waiting`), and one that may rightly take long says why (`patient`).

One record a process, as a process is what stands still. What is left out: who looks at it (`runtime/`), and calls of
torch.distributed, which are counted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

START_UP = "start-up"
IDLE = "waiting for a call"


class Progress:
    """`phase`: the call under way, START_UP or IDLE. `steps` only grows; `label` is the last of them."""

    def __init__(self) -> None:
        self.phase = START_UP
        self.steps = 0
        self.label = ""
        self.wait = ""
        self.patience = ""

    def enter(self, phase: str) -> None:
        self.phase, self.label = phase, ""
        self.steps += 1

    def step(self, label: str) -> None:
        self.label = label
        self.steps += 1

    @contextmanager
    def waiting(self, whom: str) -> Iterator[None]:
        """Inside, this process does nothing but wait for other ranks."""
        before, self.wait = self.wait, whom
        try:
            yield
        finally:
            self.wait = before

    @contextmanager
    def patient(self, why: str) -> Iterator[None]:
        """Inside, that no step is made means nothing."""
        before, self.patience = self.patience, why
        try:
            yield
        finally:
            self.patience = before


PROGRESS = Progress()
