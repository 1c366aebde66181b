"""The watch and the pulses that it hears, over real connections, in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import Any

import pytest

from megatron_dapo.runtime.beat import Beat
from megatron_dapo.runtime.group import RankStalledError, WorkerError, WorkerGroup
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.pulse import Pulse
from megatron_dapo.runtime.stall import Elsewhere
from megatron_dapo.runtime.watch import AsideGroup, Watch

STILL = Beat(1, "Worker.train", "micro-batch 2 of 4", 7, 1000.0, "", "", {"world": 5}, "in f\n")
WAITING = replace(STILL, rank=0, wait="all_reduce", collectives={"world": 6})


class Driver:
    """Takes the error at once, as a driver does that is not stuck."""

    def __init__(self) -> None:
        self.stalled = threading.Event()
        self.errors: list[RankStalledError] = []

    def fail(self, error: RankStalledError) -> threading.Event:
        self.errors.append(error)
        self.stalled.set()
        return self.stalled


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def watch(driver: Driver) -> Iterator[Watch]:
    watch = Watch(2, 20.0, driver.fail)
    yield watch
    watch.close()


class Worker:
    def double(self, number: int) -> int:
        return 2 * number

    def count(self, most: int) -> Iterator[int]:
        yield from range(most)

    def fail(self, _: None) -> None:
        raise ValueError("planted")


def beat(watch: Watch, *beats: Beat) -> list[Any]:
    """Connections over which these have been sent and answered."""
    connections = []
    for one in beats:
        address = watch.address("127.0.0.1")
        connections.append(Client((address.host, address.port), authkey=address.key))
        connections[-1].send(one)
        assert connections[-1].recv() is None
    return connections


def test_a_stall_is_told_with_the_last_will_of_the_run(watch: Watch, driver: Driver) -> None:
    sizes = []

    def last_will(aside: WorkerGroup) -> str:
        sizes.append(aside.size)
        return "The next start goes on after step 8."

    watch.last_will = last_will
    kept = beat(watch, WAITING, STILL)
    assert driver.stalled.wait(20)
    (error,) = driver.errors
    assert (error.rank, error.phase, sizes) == (1, "Worker.train", [2])
    assert str(error).splitlines() == [
        "rank 1 stood still for 1000 s in Worker.train, micro-batch 2 of 4 while 1 waited (rank 0). Its stack:",
        "in f",
        "",
        "The next start goes on after step 8.",
    ]
    assert len(kept) == 2


def test_a_last_will_that_fails_does_not_keep_the_run_from_ending(watch: Watch, driver: Driver) -> None:
    def last_will(aside: WorkerGroup) -> str:
        raise OSError("planted")

    watch.last_will = last_will
    kept = beat(watch, WAITING, STILL)
    assert driver.stalled.wait(20)
    assert "What is saved could not be found out: OSError: planted" in str(driver.errors[0])
    assert len(kept) == 2


def test_a_rank_that_falls_silent_is_accused_and_one_that_has_left_is_not(driver: Driver) -> None:
    watch = Watch(2, 1.0, driver.fail)
    (left,) = beat(watch, replace(WAITING, still=0.0))
    left.close()
    kept = beat(watch, replace(STILL, still=0.0))
    assert driver.stalled.wait(20)
    watch.close()
    assert driver.errors[0].rank == 1
    assert "rank 1 has not answered for 1 s; it was last seen in Worker.train" in str(driver.errors[0])
    assert len(kept) == 1


def test_a_rank_alone_in_its_group_is_accused_when_another_group_waits_for_it(driver: Driver) -> None:
    engines = Watch(1, 20.0, driver.fail)

    def elsewhere() -> Elsewhere:
        return Elsewhere(("engines",) if engines.somebody_waits(or_is_through=False) else (), engines.somebody_works())

    policy = Watch(1, 20.0, driver.fail, group="policy", elsewhere=elsewhere)
    kept = beat(policy, replace(STILL, rank=0))
    assert not driver.stalled.wait(3)
    kept += beat(engines, replace(WAITING, rank=0, wait="a bucket of weights"))
    assert driver.stalled.wait(20)
    for watch in (engines, policy):
        watch.close()
    said = "rank 0 of the policy stood still for 1000 s in Worker.train, micro-batch 2 of 4 while the engines waited."
    assert said in str(driver.errors[0])
    assert len(kept) == 2


def test_a_stranger_without_the_key_is_turned_away_and_others_still_come_in(watch: Watch) -> None:
    address = watch.address("127.0.0.1")
    with pytest.raises(AuthenticationError):
        Client((address.host, address.port), authkey=b"another run's")
    assert len(beat(watch, WAITING)) == 1


@pytest.fixture
def aside(driver: Driver) -> Iterator[AsideGroup]:
    watch = Watch(2, 3.0, driver.fail)
    hosts = [WorkerHost(), WorkerHost()]
    for host in hosts:
        host.add(Worker())
    for rank in range(2):
        Pulse(rank, watch.address("127.0.0.1"), lambda rank=rank: hosts[rank])
    yield AsideGroup(watch, 2, None)
    watch.close()


def test_calls_aside_reach_every_rank_and_come_back_in_order(aside: AsideGroup) -> None:
    assert aside.call(Worker.double, [1, 2]) == [2, 4]
    assert aside.call_all(Worker.count, 2) == [[0, 1], [0, 1]]
    assert list(aside.start(Worker.double, [1, 2])) == [(0, 2), (1, 4)]


def test_a_call_aside_that_fails_names_its_rank(aside: AsideGroup) -> None:
    with pytest.raises(WorkerError, match=r"rank 0 failed in Worker.fail:\nValueError: planted"):
        aside.call_all(Worker.fail)


def test_a_rank_that_cannot_be_heard_is_not_asked(watch: Watch) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 failed in Worker.double:\nit does not answer"):
        AsideGroup(watch, 2, unheard=1).call(Worker.double, [1, 2])
