"""Scoring processes that can be killed: every task comes back with a result, whatever the reward function does.

A task that raises, returns nonsense, hangs or takes its process down costs itself and nobody else. Not here: what a
reward means (`verdict.py`), and what follows from a failure (`failure_rate.py` and the group rules of `data/`).
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Hashable
from multiprocessing import connection
from types import TracebackType
from typing import Generic, TypeVar

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.rewards.process import START_LIMIT, Job, WorkerProcess
from megatron_dapo.rewards.table import RewardTask, VerifierSpec
from megatron_dapo.rewards.verdict import Verdict, failure
from megatron_dapo.types import RewardResult, RewardStatus

BATCH_LIMIT = 64  # tasks handed out at once
START_ATTEMPTS = 3  # processes in a row that fail to start before the pool gives up

Key = TypeVar("Key", bound=Hashable)


class RewardWorkerError(RuntimeError):
    """Scoring processes do not start. The message ends with what the last one said."""


class RewardPool(Generic[Key]):
    """Scores tasks in `num_workers` processes. For one thread at a time; work is handed out inside `poll`.

    A context manager; the processes end with `close`, with the parent's life at the latest.
    """

    def __init__(self, spec: VerifierSpec, num_workers: int, timeout: float, max_retries: int):
        """Start the processes and wait until all have loaded their verifiers.

        Args:
            timeout: seconds that one task may take.
            max_retries: times that a task is tried again after a timeout or an error.

        Raises:
            ConfigError: a number out of range, or a custom reward function that cannot be used.
            RewardWorkerError: the processes do not start.
        """
        if num_workers < 1 or timeout <= 0 or max_retries < 0:
            raise ConfigError(
                f"reward_model.num_workers {num_workers}, timeout {timeout} and max_retries {max_retries}: "
                "they must be at least 1, above 0 and at least 0"
            )
        self._spec, self._timeout, self._max_retries = spec, timeout, max_retries
        self._queue: deque[Job] = deque()
        self._finished: list[tuple[Key, RewardResult]] = []
        self._failed_starts = 0
        self._workers: list[WorkerProcess] = []
        try:
            for _ in range(num_workers):
                self._workers.append(WorkerProcess(spec, timeout))
            while not all(worker.ready for worker in self._workers):
                self._step(START_LIMIT)
        except BaseException:
            self.close()
            raise

    @property
    def pending(self) -> int:
        """Tasks submitted and not yet returned by `poll`."""
        return len(self._queue) + sum(len(worker.jobs) for worker in self._workers) + len(self._finished)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(worker.pid for worker in self._workers)

    def submit(self, key: Key, task: RewardTask) -> None:
        """Queue a task; its result comes back under `key`.

        Raises:
            pickle.PicklingError, TypeError, AttributeError: `extra_info` holds what cannot be sent to a process.
        """
        self._queue.append(Job(key, pickle.dumps(task, pickle.HIGHEST_PROTOCOL)))

    def poll(self, wait: float) -> list[tuple[Key, RewardResult]]:
        """Results that came since the last call, in any order; waits up to `wait` seconds for the first.

        Ctrl-C inside may cut a message in two: `close` is then all that is left to do.

        Raises:
            RewardWorkerError, ConfigError: no process can be started in the place of one that died.
        """
        end = time.monotonic() + wait
        self._dispatch()
        while self.pending:
            left = end - time.monotonic()
            self._step(0.0 if self._finished else max(left, 0.0))
            self._dispatch()
            if self._finished or left <= 0:
                break
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """End all processes; what is pending is lost. May be called twice."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._queue.clear()

    def __enter__(self) -> RewardPool[Key]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _dispatch(self) -> None:
        """Give each idle process a share of the queue that shrinks with it, so that all end at about the same time."""
        for worker in filter(lambda worker: worker.idle, self._workers):
            share = min(BATCH_LIMIT, -(-len(self._queue) // (2 * len(self._workers))))
            jobs = [self._queue.popleft() for _ in range(share)]
            if not jobs:
                return
            # One that failed before goes alone: if it hangs again, nothing waits behind it.
            alone = next((job for job in jobs if job.failures), None)
            if alone is not None:
                self._queue.extendleft(job for job in reversed(jobs) if job is not alone)
                jobs = [alone]
            worker.assign(jobs)

    def _step(self, wait: float) -> None:
        """Read what the processes answered, waiting up to `wait` seconds; then kill those past their deadline."""
        nearest = min(worker.deadline for worker in self._workers)
        wait = max(0.0, min(wait, nearest - time.monotonic()))
        readable = set(connection.wait([worker.connection for worker in self._workers], wait))
        for worker in [worker for worker in self._workers if worker.connection in readable]:
            self._read(worker)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            self._overdue(worker)

    def _read(self, worker: WorkerProcess) -> None:
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                if worker.ready:
                    verdicts, at = message
                    for job, fields in zip(worker.answered(len(verdicts), at), verdicts, strict=True):
                        self._settle(job, Verdict(*fields))
                elif message is None:
                    worker.started()
                    self._failed_starts = 0
                else:
                    is_setting, text = message
                    return self._not_started(worker, text, is_setting)
        except (EOFError, ConnectionError):
            self._died(worker)

    def _settle(self, job: Job, verdict: Verdict) -> None:
        result = RewardResult(*verdict)
        if result.usable or job.failures == self._max_retries:
            self._finished.append((job.key, result))
        else:
            job.failures += 1
            self._queue.append(job)

    def _overdue(self, worker: WorkerProcess) -> None:
        if not worker.ready:
            return self._not_started(worker, f"it was not ready after {START_LIMIT:g} s", False)
        self._replace(worker, "timeout", f"no verdict within {self._timeout:g} s")

    def _died(self, worker: WorkerProcess) -> None:
        if not worker.ready:
            return self._not_started(worker, f"it died: {worker.kill()}", False)
        self._replace(worker, "error", f"the scoring process died: {worker.kill()}")

    def _not_started(self, worker: WorkerProcess, text: str, is_setting: bool) -> None:
        if is_setting:
            raise ConfigError(text)
        self._failed_starts += 1
        if self._failed_starts >= START_ATTEMPTS:
            raise RewardWorkerError(f"{self._failed_starts} scoring processes in a row did not start; the last: {text}")
        self._replace(worker, "error", text)

    def _replace(self, worker: WorkerProcess, status: RewardStatus, detail: str) -> None:
        """Another process for this one. The job that it was working on has failed; those behind are no worse for it."""
        worker.kill()
        if worker.jobs:
            job, others = worker.take_back()
            self._queue.extendleft(reversed(others))
            self._settle(job, failure(status, detail))
        self._workers[self._workers.index(worker)] = WorkerProcess(self._spec, self._timeout)
