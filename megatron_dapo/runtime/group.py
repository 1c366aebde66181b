"""The two shapes of a distributed call. The trainer knows these, not who schedules the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


class Handle(Protocol):
    """A call under way on every rank of a group. Iterate it or ask for its result, not both."""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(rank, item) as they arrive: each value that a generator yields, or the one that another method returns."""
        ...

    def result(self) -> list[Any]:
        """Wait for all ranks. [rank] -> the returned value; a generator method's yielded values as a list."""
        ...


class WorkerGroup(Protocol):
    """The workers of every rank. One call at a time: a handle is finished before the next call starts."""

    size: int

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> Handle:
        """Run `method(worker, shards[rank])` on every rank; `method` is the unbound function, `Worker.method`.

        A module-level function gets the rank's `WorkerHost` in place of a worker.

        Raises:
            ValueError: len(shards) is not `size`.
            TypeError, LookupError: no worker has that method (`WorkerHost.stream`).
            RuntimeError: the call before is not finished.
            WorkerError: (from the handle too) a rank failed; names the rank, the phase and holds its traceback.
        """
        ...

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        """start(...).result()"""
        ...

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        """The same argument on every rank."""
        ...

    def on_stall(self, last_will: Callable[[WorkerGroup], str]) -> None:
        """What to do when a rank stalls, in another thread than the main one, before the run is ended.

        `last_will` gets a group whose calls run beside the ranks' main threads, and returns what is saved, in words.
        """
        ...


class WorkerError(RuntimeError):
    """A worker failed. The message names rank and phase and ends with the rank's own traceback."""

    def __init__(self, rank: int, phase: str, traceback: str, group: str = ""):
        """`group`: see `rank_name`."""
        super().__init__(f"{rank_name(rank, group)} failed in {phase}:\n{traceback}")
        self.rank, self.phase, self.traceback = rank, phase, traceback


class RankStalledError(WorkerError):
    """A rank stood still while others waited for it. The message names it, its phase and its stack, and what is saved;
    it is `traceback` too."""

    def __init__(self, rank: int, phase: str, report: str):
        super().__init__(rank, phase, report)
        self.args = (report,)


def rank_name(rank: int, group: str = "") -> str:
    """`rank 1`; where a run has several groups, and this one therefore a name, `rank 1 of the engines`."""
    return f"rank {rank} of the {group}" if group else f"rank {rank}"
