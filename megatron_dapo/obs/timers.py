"""Seconds of a step by phase, under the metric names `seconds/...`.

Wall time, and the CPU time of this process alone: no other rank's, no scoring process's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Phases may nest: `rollout` with `reward` inside gives `seconds/rollout` (all of it) and `seconds/rollout/reward`.

    A phase entered several times in a step is summed. For one thread.
    """

    def __init__(
        self, wall: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time
    ) -> None:
        self._wall, self._cpu = wall, cpu
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._step_wall, self._step_cpu = wall(), cpu()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside, also where it raises."""
        self._open.append(name)
        path = "/".join(self._open)
        started = self._wall()
        try:
            yield
        finally:
            self._seconds[path] = self._seconds.get(path, 0.0) + self._wall() - started
            self._open.pop()

    def flush(self) -> dict[str, float]:
        """Metric name -> seconds since the last flush, and start anew.

        `seconds/step` is the wall time of all, `seconds/step_cpu` the CPU time of this process in it.

        Raises:
            RuntimeError: a phase is still open.
        """
        if self._open:
            raise RuntimeError(f"flush inside the open phase {'/'.join(self._open)!r}; leave it first")
        wall, cpu = self._wall(), self._cpu()
        seconds = {f"seconds/{path}": value for path, value in self._seconds.items()}
        seconds |= {"seconds/step": wall - self._step_wall, "seconds/step_cpu": cpu - self._step_cpu}
        self._seconds, self._step_wall, self._step_cpu = {}, wall, cpu
        return seconds
