"""The driver's side of a call, under torchrun and Ray alike. Left out: how the items come (`spmd.py`, `ray.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_dapo.runtime.host import phase_of, streams


class CallHandle:
    """A call under way. Iterate it or ask for its result, not both: an item that was handed out is not kept."""

    def __init__(self, size: int, method: Callable[..., Any], items: Iterator[tuple[int, Any]]):
        """
        Args:
            size: of the group.
            items: (rank, item) as they arrive; ends with the call.
        """
        self._size, self._method, self._items = size, method, items
        self._taken = False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(rank, item) as they arrive.

        Raises:
            WorkerError: see `WorkerGroup.start`.
        """
        self._taken = True
        return self._items

    def result(self) -> list[Any]:
        """[rank] -> the returned value, or the list of yielded ones.

        Raises:
            RuntimeError: the items were taken already.
            WorkerError: see `WorkerGroup.start`.
        """
        if self._taken:
            raise RuntimeError(f"the items of {phase_of(self._method)} were taken already; start it again")
        items: list[list[Any]] = [[] for _ in range(self._size)]
        for rank, item in self:
            items[rank].append(item)
        return items if streams(self._method) else [item for (item,) in items]


def check_start(method: Callable[..., Any], shards: Sequence[Any], size: int, busy: str | None) -> None:
    """Whether a group can start a call.

    Args:
        busy: the phase of the call under way, if there is one.

    Raises:
        ValueError: len(shards) is not `size`.
        RuntimeError: the call before this one was not finished.
    """
    phase = phase_of(method)
    if len(shards) != size:
        raise ValueError(f"{phase}: {len(shards)} shards for {size} ranks; give one to each")
    if busy is not None:
        raise RuntimeError(f"cannot start {phase}: {busy} is not finished; take its result() first")
