"""The parent's hold on one scoring process: start it, hand it a batch, read its answers, kill it.

Started as a fresh interpreter and not by `multiprocessing`, which would run the user's main script again.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import megatron_dapo
from megatron_dapo.rewards.table import VerifierSpec

START_LIMIT = 120.0  # seconds a process may take to import what it needs

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_dapo.rewards.worker import main; main(*map(int, sys.argv[2:]))"
)


class Job:
    """A task on its way, pickled once. `failures` counts the times that it failed."""

    def __init__(self, key: Any, blob: bytes):
        self.key, self.blob, self.failures = key, blob, 0


class WorkerProcess:
    """`jobs` are those handed out and not answered, in order.

    `deadline` (monotonic seconds) is when the process has taken too long: to start, or for a job.
    """

    def __init__(self, spec: VerifierSpec, timeout: float):
        """Start it; it says when it is ready."""
        self.connection, theirs = Pipe()
        # Nothing is ever written to it: that we no longer hold it is what the process dies of.
        lifeline, self._lifeline = Pipe(duplex=False)
        progress_fd = os.memfd_create("megatron_dapo reward progress")
        os.ftruncate(progress_fd, 1)
        self._progress = mmap.mmap(progress_fd, 1)
        fds = (theirs.fileno(), lifeline.fileno(), progress_fd)
        # The parent's module search path, so that a user's function finds what it finds in the parent.
        search_path = [*map(str, sys.path), str(Path(megatron_dapo.__file__).parents[1])]
        with theirs, lifeline:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOT, json.dumps(search_path), *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own: killed together with whatever it started
            )
        os.close(progress_fd)
        self._timeout = timeout
        self._answered = 0  # of the batch
        self.jobs: deque[Job] = deque()
        self.ready = False
        self.deadline = time.monotonic() + START_LIMIT
        with suppress(ConnectionError):  # it died already: reading from it will say so
            self.connection.send(spec)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def idle(self) -> bool:
        return self.ready and not self.jobs

    def assign(self, jobs: list[Job]) -> None:
        """Hand over a batch. Only to an idle process: it is reading, so that sending cannot block for long."""
        self.jobs.extend(jobs)
        self._progress[0], self._answered = 0, 0
        self.deadline = time.monotonic() + self._timeout
        with suppress(ConnectionError):  # it is gone, with these jobs: reading from it will say so
            self.connection.send([job.blob for job in jobs])

    def started(self) -> None:
        self.ready, self.deadline = True, math.inf

    def answered(self, count: int, at: float) -> list[Job]:
        """The next `count` jobs, which were answered at monotonic time `at`; the time of the next one starts then."""
        self._answered += count
        jobs = [self.jobs.popleft() for _ in range(count)]
        self.deadline = at + self._timeout if self.jobs else math.inf
        return jobs

    def take_back(self) -> tuple[Job, list[Job]]:
        """(the job being worked on, the others in order) of those not answered. Only once it is killed.

        Some of the others may have been judged; their verdicts are lost.
        """
        at_fault = min(self._progress[0] - self._answered, len(self.jobs) - 1)
        job = self.jobs[at_fault]
        del self.jobs[at_fault]
        others = list(self.jobs)
        self.jobs.clear()
        return job, others

    def kill(self) -> str:
        """End the process and all it started; returns how it ended, in words."""
        if self._process.returncode is None:
            # Not waited for yet, so that its process group cannot be another's by now.
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self.connection.close()
        self._lifeline.close()
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
