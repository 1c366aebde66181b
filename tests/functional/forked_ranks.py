"""Ranks as forks of one process that has imported everything: seconds instead of tens of them.

Not by torchrun's agent: it serves the ranks' store in a thread that looks up who connects. A rank forked meanwhile
finds glibc's resolver locked, by a thread that it does not have, and waits for ever at its own first look-up. Here the
store is rank 0's, and nothing runs beside the process that forks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes

GRACE = 5.0  # seconds for the others to end by themselves when a rank has failed, and again after SIGTERM


def run_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """`function(*args)` on each rank, in the environment that torchrun would give it.

    Raises:
        torch.multiprocessing.spawn.ProcessException: a rank failed; the others were ended. The message says how.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = start_processes(_rank, args=(ranks, port, function, args), nprocs=ranks, join=False, start_method="fork")
    assert isinstance(context, ProcessContext)
    while not context.join(grace_period=GRACE):
        pass


def _rank(rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)
