from __future__ import annotations

import pytest

from megatron_dapo.obs.timers import Timers


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nested_and_repeated_phases_add_up_and_a_flush_starts_anew():
    wall, cpu = Clock(), Clock()
    timers = Timers(wall, cpu)
    with timers.phase("rollout"):
        wall.now += 1
        for seconds in (2, 4):
            with timers.phase("reward"):
                wall.now += seconds
    wall.now += 8
    cpu.now += 5
    assert timers.flush() == {
        "seconds/rollout": 7,
        "seconds/rollout/reward": 6,
        "seconds/step": 15,
        "seconds/step_cpu": 5,
    }
    wall.now += 3
    assert timers.flush() == {"seconds/step": 3, "seconds/step_cpu": 0}


def test_a_phase_that_raises_is_timed_and_closed():
    wall = Clock()
    timers = Timers(wall, wall)
    with pytest.raises(KeyError), timers.phase("update"):
        wall.now += 2
        raise KeyError
    assert timers.flush()["seconds/update"] == 2


def test_a_flush_inside_a_phase_is_refused_by_name():
    timers = Timers()
    with timers.phase("rollout"), timers.phase("reward"), pytest.raises(RuntimeError, match="rollout/reward"):
        timers.flush()


def test_real_clocks_count_up():
    timers = Timers()
    with timers.phase("work"):
        sum(range(1000))
    seconds = timers.flush()
    assert 0 < seconds["seconds/work"] <= seconds["seconds/step"]
