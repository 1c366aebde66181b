"""What a rank tells of itself in a heartbeat, and how it is found out from a thread beside the work.

A rank has moved if its progress record has (`progress.py`) or if it has begun another collective: torch counts these
in every process group. Time counts only as far as this thread ran, so a process that was stopped and goes on, or a
machine that slept, has not stood still meanwhile.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_dapo.progress import Progress

# Python code whose innermost frame waits for another rank: a collective, or a message between pipeline stages.
COMMUNICATION = ("torch.distributed", "megatron.core.pipeline_parallel.p2p_communication")


@dataclass(frozen=True)
class Beat:
    """`still`: seconds in which the rank has not moved. Empty text: nothing of the kind."""

    rank: int
    phase: str
    label: str  # the last step of the phase
    steps: int
    still: float
    patience: str  # why that may rightly take long
    wait: str  # what of other ranks it waits for
    collectives: Mapping[str, int]  # process group -> collectives begun
    stack: str  # where its threads are, once it has stood still for a while


class Sampler:
    """Makes the beats of this process."""

    def __init__(
        self,
        rank: int,
        progress: Progress,
        one_gap: float,
        stack_after: float,
        clock: Callable[[], float] = time.monotonic,
        collectives: Callable[[], dict[str, int]] | None = None,
    ):
        """
        Args:
            one_gap: seconds that the time between two beats counts at most.
            stack_after: seconds of standing still from which on a beat has a stack.
        """
        self._rank, self._progress, self._one_gap, self._stack_after = rank, progress, one_gap, stack_after
        self._clock, self._collectives = clock, collectives or collectives_begun
        self._before: object = None
        self._still, self._sampled = 0.0, clock()

    def beat(self) -> Beat:
        now, seen = self._clock(), self._progress
        begun = self._collectives()
        state = (seen.steps, seen.wait, seen.patience, begun)
        passed = min(now - self._sampled, self._one_gap)
        self._still = self._still + passed if state == self._before else 0.0
        self._before, self._sampled = state, now
        return Beat(
            rank=self._rank,
            phase=seen.phase,
            label=seen.label,
            steps=seen.steps,
            still=self._still,
            patience=seen.patience,
            wait=seen.wait or communication(_main_frame()),
            collectives=begun,
            stack=stacks() if self._still >= self._stack_after else "",
        )


def collectives_begun() -> dict[str, int]:
    """Process group -> how many collectives this rank has begun in it. Equal on all its members when all is well.

    Not those of a pipeline: there gloo counts messages between two stages too, and stages send unequally many.
    """
    groups = list(distributed_c10d._world.pg_names.items()) if dist.is_initialized() else []
    return {
        name: int(group._get_sequence_number_for_group())  # pyright: ignore[reportAttributeAccessIssue]
        for group, name in groups
        if group.size() > 1 and "PIPELINE" not in group.group_desc
    }


def communication(frame: FrameType | None) -> str:
    """The function that waits for other ranks, if the innermost frame is one's."""
    if frame is None or not str(frame.f_globals.get("__name__")).startswith(COMMUNICATION):
        return ""
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"


def stacks() -> str:
    """Where the main thread is, and threads that Python did not start: autograd runs a GPU's backward pass in them."""
    main = threading.main_thread().ident
    ours = {thread.ident for thread in threading.enumerate()} - {main}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident not in ours}
    ordered = sorted(frames.items(), key=lambda item: item[0] != main)
    return "".join(
        f"{'Main thread' if ident == main else 'Another thread'} (most recent call last):\n"
        + "".join(traceback.format_stack(frame))
        for ident, frame in ordered
    )


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)
