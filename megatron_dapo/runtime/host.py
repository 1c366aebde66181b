"""The workers that live in one process, and how a call finds the right one.

A call names a function. A worker's method runs on the worker of its class; a module-level function gets the host
itself, for what needs two workers of one process (weights from the policy into the engine beside it).
What is left out: who sends the calls (`spmd.py`), and any wish of a worker's for another rank.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeVar

from megatron_dapo.progress import IDLE, PROGRESS

W = TypeVar("W")


class WorkerHost:
    """The workers of this process, by class. `phase` names the function that runs now."""

    def __init__(self) -> None:
        self._workers: dict[type, object] = {}
        self.phase = IDLE

    def add(self, worker: object) -> None:
        """Raises ValueError: there is a worker of this class already."""
        if type(worker) in self._workers:
            raise ValueError(
                f"the host has a {type(worker).__name__} already; one worker of a class lives in a process"
            )
        self._workers[type(worker)] = worker

    def get(self, cls: type[W]) -> W:
        """The worker of class `cls`, or of a class derived from it.

        Raises:
            LookupError: there is none, or there are several derived ones.
        """
        found = [worker for worker in self._workers.values() if isinstance(worker, cls)]
        exact = [worker for worker in found if type(worker) is cls]
        if len(exact or found) == 1:
            return (exact or found)[0]
        names = ", ".join(sorted(have.__name__ for have in self._workers)) or "none"
        count = "no" if not found else f"{len(found)} workers that are a"
        raise LookupError(
            f"this process has {count} {cls.__name__}; its workers: {names}. Add the one wanted to the host"
        )

    def run(self, function: Callable[..., Any], argument: Any) -> Any:
        """What the function returns; a generator's yielded values as a list. Errors as for `stream`."""
        items = list(self.stream(function, argument))
        return items if streams(function) else items[0]

    def stream(self, function: Callable[..., Any], argument: Any) -> Iterator[Any]:
        """Each value that a generator function yields, or the one value that another function returns.

        `phase` goes back to what it was when the function is through. After an error it stays, so that a report
        names the innermost call.

        Raises:
            TypeError: `function` is neither a method as its class holds it nor a module-level function.
            LookupError: no worker of its class lives here.
        """
        receiver = self.receiver(function)
        before, self.phase = self.phase, phase_of(function)
        PROGRESS.enter(self.phase)
        for item in function(receiver, argument) if streams(function) else (function(receiver, argument),):
            with PROGRESS.patient("the driver has the word"):
                yield item
        self.phase = before
        PROGRESS.enter(before)

    def receiver(self, function: Callable[..., Any]) -> object:
        """Whom the function gets as its first argument: a worker, or this host. Errors as for `stream`."""
        owner = _owner(function)
        return self if owner is None else self.get(owner)


def streams(function: Callable[..., Any]) -> bool:
    """Whether a call of it gives several values, one after the other."""
    return inspect.isgeneratorfunction(function)


def phase_of(function: Callable[..., Any]) -> str:
    """`PolicyWorker.train`."""
    return getattr(function, "__qualname__", repr(function))


def _owner(function: Callable[..., Any]) -> type | None:
    """The class whose body defines the function; None for a module-level one."""
    if not isinstance(function, FunctionType) or "<" in function.__qualname__:
        raise TypeError(
            f"{function!r} cannot be called on other ranks; wanted a method as its class holds it (Worker.method, "
            f"not worker.method) or a function that stands at the top level of a module"
        )
    *classes, _ = function.__qualname__.split(".")
    if not classes:
        return None
    found: Any = sys.modules[function.__module__]
    for name in classes:
        found = getattr(found, name)
    return found
