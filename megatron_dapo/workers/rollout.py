"""Rollout over a worker group: an engine on each rank, and one engine to the driver that spreads requests over them.

An engine that is another process may die or hang. Its rank notes it and goes on; the driver sees which requests never
came back, has the engines restored with the present weights, and gives those requests to them again, seeds and all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from megatron_dapo.progress import PROGRESS
from megatron_dapo.rollout.engine import ALL_TAGS, RolloutEngine, Tag
from megatron_dapo.rollout.failures import EngineFailedError, PortInUseError
from megatron_dapo.runtime.group import Handle, WorkerGroup
from megatron_dapo.types import Completion, Request


class RolloutWorker:
    """One rank's engine. `failure`, in words, is why it needs a restart; empty where it is well."""

    def __init__(self, engine: RolloutEngine):
        self.engine = engine
        self.failure = ""

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Completions as they finish; fewer than requests where the engine fails."""
        with self._noting_failure():
            if self.failure:
                return
            self.engine.submit(requests)
            while self.engine.pending:
                PROGRESS.step("generation")  # also where nothing is finished yet: a long rollout is no stall
                yield self.engine.poll()

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Into the engine. All of `tensors` are taken, whatever becomes of it: other ranks take part in making them.

        Raises:
            ValueError: the engine has no such weights.
        """
        arriving = iter(tensors)
        try:
            with self._noting_failure():
                if not self.failure:
                    self.engine.load_weights(arriving, version)
        finally:
            for _ in arriving:
                pass

    def weight_checksums(self, _: None) -> Mapping[str, int] | None:
        """See `RolloutEngine.weight_checksums`. None from a failed engine."""
        with self._noting_failure():
            if not self.failure:
                return dict(self.engine.weight_checksums())
        return None

    def sleep(self, tags: Sequence[Tag]) -> None:
        with self._noting_failure():
            if not self.failure:
                self.engine.sleep(tags)

    def wake(self, tags: Sequence[Tag]) -> None:
        with self._noting_failure():
            if not self.failure:
                self.engine.wake(tags)

    def report_failure(self, _: None) -> str:
        return self.failure

    @PROGRESS.patient("an engine is started again")
    def restart_failed(self, _: None) -> None:
        """Start the engine again if it has failed; it has no weights then. A start that fails is a failure again."""
        if self.failure:
            try:
                self.engine.restart()
                self.failure = ""
            except (EngineFailedError, PortInUseError) as error:
                self.failure = str(error)

    @PROGRESS.patient("an engine is ended")
    def close(self, _: None) -> None:
        self.engine.close()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except EngineFailedError as error:
            self.failure = str(error)


class RolloutFleet:
    """The engines of all ranks as one, for whoever submits and polls.

    Requests of one `submit` call are spread over the ranks by draw, in the order in which the draws come, so that a
    prompt's responses share one engine's prefill. Calls take turns. `checkpoint` is called between completions:
    it may raise to end the rollout, and `abort` then leaves every rank idle. `restore` is called when a rank has
    answered less than it was asked, and no call is under way: it starts failed engines and gives them weights, or
    raises. Every `engine_every`th rank has an engine.
    """

    def __init__(
        self,
        group: WorkerGroup,
        checkpoint: Callable[[], None],
        restore: Callable[[], None],
        engine_every: int = 1,
    ):
        self._group, self._checkpoint, self._restore = group, checkpoint, restore
        self._engine_ranks = range(0, group.size, engine_every)
        self._queue: deque[Sequence[Request]] = deque()
        self._arrivals: Iterator[tuple[int, list[Completion]]] | None = None
        self._awaited: dict[tuple[int, int], Request] = {}  # of the call under way
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
            self._awaited = {(r.draw_index, r.sample_index): r for r in requests}
            self._arrivals = iter(self._start(requests))
        _, completions = next(self._arrivals, (0, None))
        if completions is None:
            self._write_again()
            return []
        for completion in completions:
            del self._awaited[completion.draw_index, completion.sample_index]
        self._pending -= len(completions)
        self.tokens_written += sum(len(completion.token_ids) for completion in completions)
        if not self._awaited:
            self._finish()
        return completions

    def sleep(self) -> None:
        """Give the devices' memory up, weights and caches, until `wake`. Nothing may be pending."""
        self._group.call_all(RolloutWorker.sleep, ALL_TAGS)

    def wake(self) -> None:
        """Take the memory back; weights have to be pushed before anything can be written."""
        self._group.call_all(RolloutWorker.wake, ALL_TAGS)

    def abort(self) -> None:
        """Drop what waits and let the ranks finish what they have begun: engines know no half-way stop of a call."""
        self._queue.clear()
        self._finish()
        self._pending = 0

    def _write_again(self) -> None:
        """All ranks are through, and requests are left: an engine has failed."""
        unfinished = tuple(self._awaited.values())
        self._arrivals, self._awaited = None, {}
        self._restore()
        self._queue.appendleft(unfinished)

    def _finish(self) -> None:
        """Take what the ranks still have to say of the call under way, so that the next one can start."""
        for _ in self._arrivals or ():
            pass
        self._arrivals, self._awaited = None, {}

    def _start(self, requests: Sequence[Request]) -> Handle:
        order = {draw: number for number, draw in enumerate(dict.fromkeys(r.draw_index for r in requests))}
        shards: list[list[Request]] = [[] for _ in range(self._group.size)]
        for request in requests:
            shards[self._engine_ranks[order[request.draw_index] % len(self._engine_ranks)]].append(request)
        return self._group.start(RolloutWorker.generate, shards)
