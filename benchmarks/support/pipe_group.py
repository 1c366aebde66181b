"""A group of worker processes on this machine that are called over pipes: two such groups are what a cluster has,
trainer and engines in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_dapo.runtime.group import WorkerError, WorkerGroup
from megatron_dapo.runtime.host import WorkerHost, phase_of

Build = Callable[[WorkerHost, Any], None]  # adds a rank's workers to its host


class PipeHandle:
    def __init__(self, group: PipeGroup, phase: str):
        self._group, self._phase = group, phase

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.result())

    def result(self) -> list[Any]:
        return [self._group.receive(rank, self._phase) for rank in range(self._group.size)]


class PipeGroup:
    """A `WorkerGroup`. `build(host, shards[rank])` runs in each process first; its environment has RANK and so on."""

    def __init__(self, build: Build, shards: Sequence[Any], environment: dict[str, str]):
        self.size = len(shards)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank, shard in enumerate(shards):
            here, there = context.Pipe()
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size)}
            process = context.Process(target=_serve, args=(there, build, shard, own), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def wait_until_built(self) -> None:
        PipeHandle(self, "start-up").result()

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> PipeHandle:
        for pipe, shard in zip(self._pipes, shards, strict=True):
            pipe.send((method, shard))
        return PipeHandle(self, phase_of(method))

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        return self.start(method, shards).result()

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        return self.call(method, [argument] * self.size)

    def on_stall(self, last_will: Callable[[WorkerGroup], str]) -> None:
        """Nobody watches these."""

    def receive(self, rank: int, phase: str) -> Any:
        try:
            good, value = self._pipes[rank].recv()
        except EOFError:
            raise WorkerError(rank, phase, "the process ended without a word") from None
        if not good:
            raise WorkerError(rank, phase, value)
        return value

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)


def _serve(pipe: Connection, build: Build, shard: Any, environment: dict[str, str]) -> None:
    os.environ |= environment
    host = WorkerHost()
    job: tuple[Callable[..., Any], Any] = (build, shard)
    while True:
        function, argument = job
        try:
            # `build` may be any function; calls find their worker through the host.
            value = build(host, argument) if function is build else host.run(function, argument)
            pipe.send((True, value))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        try:
            job = pipe.recv()
        except EOFError:  # the driver is through
            os._exit(0)
