"""How tests start ranks by forks: torchrun's agent, as it is set up for that."""

from __future__ import annotations

import os
import socket

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig


def forking(ranks: int, logs: str | None = None) -> LaunchConfig:
    """Ranks on this host, met at an address that is given.

    torchrun's usual rendezvous keeps a thread that looks hosts up. A rank forked meanwhile finds glibc's resolver
    locked, by a thread that it does not have, and waits for ever at its own first look-up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0, "timeout": 60},
        run_id=str(os.getpid()),
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
