"""Rollout over a worker group: an engine on each rank, and one engine to the driver that spreads requests over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from megatron_dapo.rollout.engine import RolloutEngine
from megatron_dapo.runtime.group import Handle, WorkerGroup
from megatron_dapo.types import Completion, Request


class RolloutWorker:
    """One rank's engine."""

    def __init__(self, engine: RolloutEngine):
        self.engine = engine

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Completions as they finish."""
        self.engine.submit(requests)
        while self.engine.pending:
            yield self.engine.poll()


class RolloutFleet:
    """The engines of all ranks as one, for whoever submits and polls.

    Requests of one `submit` call are spread over the ranks by draw, in the order in which the draws come, so that a
    prompt's responses share one engine's prefill. Calls take turns. `checkpoint` is called between completions:
    it may raise to end the rollout, and `abort` then leaves every rank idle.
    """

    def __init__(self, group: WorkerGroup, checkpoint: Callable[[], None]):
        self._group, self._checkpoint = group, checkpoint
        self._queue: deque[Sequence[Request]] = deque()
        self._arrivals: Iterator[tuple[int, list[Completion]]] | None = None
        self._awaited = 0  # completions of the call under way still to come
        self._pending = 0
        self.tokens_written = 0  # response tokens of all completions so far

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, requests: Sequence[Request]) -> None:
        if requests:
            self._queue.append(tuple(requests))
            self._pending += len(requests)

    def poll(self) -> list[Completion]:
        self._checkpoint()
        if self._arrivals is None:
            if not self._queue:
                return []
            requests = self._queue.popleft()
            self._arrivals, self._awaited = iter(self._start(requests)), len(requests)
        _, completions = next(self._arrivals)
        self._awaited -= len(completions)
        self._pending -= len(completions)
        self.tokens_written += sum(len(completion.token_ids) for completion in completions)
        if not self._awaited:
            self._finish()
        return completions

    def abort(self) -> None:
        """Drop what waits and let the ranks finish what they have begun: engines know no half-way stop of a call."""
        self._queue.clear()
        self._finish()
        self._pending = 0

    def _finish(self) -> None:
        """Take what the ranks still have to say of the call under way, so that the next one can start."""
        for _ in self._arrivals or ():
            pass
        self._arrivals, self._awaited = None, 0

    def _start(self, requests: Sequence[Request]) -> Handle:
        order = {draw: number for number, draw in enumerate(dict.fromkeys(r.draw_index for r in requests))}
        shards: list[list[Request]] = [[] for _ in range(self._group.size)]
        for request in requests:
            shards[order[request.draw_index] % self._group.size].append(request)
        return self._group.start(RolloutWorker.generate, shards)
