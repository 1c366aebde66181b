"""`stalling_run.py FAULT train CONFIG ...`: the command line, on a package in which a rank has a fault.

Under torchrun it is rank 1 of two. Under Ray, where each process imports the package for itself, the fault travels with
what a rank builds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_dapo import launch
from megatron_dapo.cli import main
from megatron_dapo.config.tree import RunConfig
from megatron_dapo.mcore import shard_write
from megatron_dapo.mcore.head import DapoHead
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.transport import StagedTransport
from megatron_dapo.workers import policy


def stuck_here() -> None:
    time.sleep(1000)


def stall_in_the_third_step() -> None:
    """In the fifth mini-batch, of two a step; while the files of the save after step 2 are written slowly."""
    pass_through, forward, write = policy.forward_backward, DapoHead.forward, shard_write._write_bucket
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return pass_through(*args)

    def stuck(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == 5 and os.environ["RANK"] == "1":
            stuck_here()
        return forward(*args, **kwargs)

    def slow(bucket: Any) -> Any:
        if "step_00000002" in str(bucket[0]):
            time.sleep(10)
        return write(bucket)

    policy.forward_backward, DapoHead.forward, shard_write._write_bucket = counted, stuck, slow


def write_slowly() -> None:
    """Rank 1 is long at its first responses."""
    poll, left = TorchEngine.poll, iter(range(5))

    def slow(engine: TorchEngine) -> Any:
        if os.environ["RANK"] == "1" and engine.pending > 4 and next(left, None) is not None:
            time.sleep(2)
        return poll(engine)

    TorchEngine.poll = slow  # type: ignore[method-assign]


def stall_in_the_third_push() -> None:
    """At its first bucket."""
    bring = StagedTransport._bring

    def stuck(transport: StagedTransport, index: int) -> Any:
        if transport._done == 2 * len(transport._views):
            stuck_here()
        return bring(transport, index)

    StagedTransport._bring = stuck  # type: ignore[method-assign]


def stall_in_a_push(builder: str) -> None:
    """On the ranks that `launch` has built by the function of this name."""
    build = getattr(launch, builder)

    def build_with_fault(config: RunConfig) -> WorkerHost:
        stall_in_the_third_push()
        return build(config)

    setattr(launch, builder, build_with_fault)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "stall": stall_in_the_third_step,
    "slow rollout": write_slowly,
    "policy stalls in a push": partial(stall_in_a_push, "build_policy_host"),
    "engine stalls in a push": partial(stall_in_a_push, "build_rollout_host"),
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
