"""What the actors of `test_ray.py` run: workers that answer, stream, fail, die and wait for each other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dapo.progress import PROGRESS
from megatron_dapo.runtime.host import WorkerHost


class Worker:
    def __init__(self) -> None:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
        self.rank = dist.get_rank()

    def sum_over_ranks(self, number: int) -> int:
        total = torch.tensor(number)
        dist.all_reduce(total)
        return int(total)

    def describe(self, shard: Any) -> tuple[int, str, Any]:
        return self.rank, type(shard).__name__, shard

    def count(self, n: int) -> Iterator[int]:
        for number in range(n):
            yield 10 * self.rank + number

    def wait_at_a_gate(self, gate: str | None) -> Iterator[str]:
        while gate is not None and not os.path.exists(gate):
            time.sleep(0.01)
        yield "open"

    def address_of(self, array: np.ndarray) -> tuple[bool, float]:
        return array.flags.writeable, float(array.sum())

    def fail_on_rank_1(self, how: str) -> None:
        """Rank 1 fails before a collective in which the others wait for it."""
        if self.rank == 1:
            if how == "raise":
                raise ValueError("planted")
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    def stall(self, how: str) -> None:
        """Rank 1 does not come to the collective in which the other waits for it."""
        PROGRESS.step("micro-batch 3 of 8")
        if self.rank == 1:
            time.sleep(2)  # so that a beat has told the phase
            if how == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        dist.barrier()

    def write_for_long(self, seconds: float) -> Iterator[None]:
        begun = time.monotonic()
        while self.rank == 1 and time.monotonic() - begun < seconds:
            PROGRESS.step("generation")
            yield None
            time.sleep(0.5)

    def give(self, _: None) -> Any:
        return (number for number in range(3))  # cannot be pickled

    def process_id(self, _: None) -> int:
        return os.getpid()


def build() -> WorkerHost:
    host = WorkerHost()
    host.add(Worker())
    return host


def build_but_rank_1() -> WorkerHost:
    if os.environ["RANK"] == "1":
        raise OSError("planted at the start")
    return build()


def environment(host: WorkerHost, names: tuple[str, ...]) -> dict[str, str]:
    return {name: os.environ[name] for name in names}
