"""What a heartbeat says of its process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from megatron_dapo.progress import Progress
from megatron_dapo.runtime.beat import Sampler, communication, stacks


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def progress() -> Progress:
    return Progress()


def make(progress: Progress, clock: Clock, begun: dict[str, int]) -> Sampler:
    return Sampler(3, progress, one_gap=3.0, stack_after=4.0, clock=clock, collectives=lambda: dict(begun))


def stills(sampler: Sampler, clock: Clock, seconds: list[float]) -> Iterator[float]:
    for passed in seconds:
        clock.now += passed
        yield sampler.beat().still


def test_time_adds_up_while_nothing_moves_and_is_gone_with_a_step_or_a_collective(progress: Progress) -> None:
    clock, begun = Clock(), {"0": 1}
    sampler = make(progress, clock, begun)
    assert list(stills(sampler, clock, [1, 1, 1])) == [0, 1, 2]
    progress.step("micro-batch")
    assert list(stills(sampler, clock, [1, 1])) == [0, 1]
    begun["0"] += 1
    assert list(stills(sampler, clock, [1, 1])) == [0, 1]
    with progress.waiting("a bucket"):
        assert list(stills(sampler, clock, [1])) == [0]


def test_the_time_for_which_a_process_was_stopped_is_not_its_fault(progress: Progress) -> None:
    clock = Clock()
    sampler = make(progress, clock, {})
    assert list(stills(sampler, clock, [1, 3600, 1])) == [0, 3, 4]


def test_a_stack_is_taken_once_it_has_stood_still_for_a_while_and_shows_the_main_thread(progress: Progress) -> None:
    clock, beats = Clock(), []
    sampler = make(progress, clock, {})
    waiting_here = threading.Thread(target=lambda: beats.extend(_beats(sampler, clock)))
    waiting_here.start()
    waiting_here.join()
    assert [bool(beat.stack) for beat in beats] == [False, False, True]
    assert "in test_a_stack_is_taken_once" in beats[-1].stack
    assert "in _beats" not in beats[-1].stack


def _beats(sampler: Sampler, clock: Clock) -> Iterator[object]:
    for _ in range(3):
        clock.now += 2
        yield sampler.beat()


def test_a_function_of_torch_distributed_waits_for_others_and_other_code_does_not() -> None:
    frames: list[FrameType] = []
    names: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d", "sys": sys, "frames": frames}
    exec("def all_reduce(): frames.append(sys._getframe())", names)
    names["all_reduce"]()
    assert communication(frames[0]) == "torch.distributed.distributed_c10d.all_reduce"
    assert communication(sys._getframe()) == ""
    assert communication(None) == ""


def test_stacks_leave_out_threads_of_the_runtime() -> None:
    gate = threading.Event()

    def stand_at_the_gate() -> None:
        gate.wait()

    thread = threading.Thread(target=stand_at_the_gate, daemon=True)
    thread.start()
    found = stacks()
    gate.set()
    assert found.startswith("Main thread (most recent call last):")
    assert "stand_at_the_gate" not in found
