"""Ranks of a real gloo group that are threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

T = TypeVar("T")


def on_ranks(size: int, function: Callable[[dist.ProcessGroup], T]) -> list[T]:
    """`function` on each rank of a group of `size`."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(function, _groups(size)))


@cache
def _groups(size: int) -> list[dist.ProcessGroup]:
    """[rank] Connected once: hundreds of meshes in a row run out of ports now and then."""
    store = HashStore()

    def connect(rank: int) -> dist.ProcessGroup:
        group = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return group

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(connect, range(size)))
