"""The host: which worker a function gets, what it gives back, and what it says of a function that fits no worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_dapo.runtime.host import IDLE, WorkerHost


class Policy:
    def __init__(self, host: WorkerHost | None = None):
        self.host = host

    def scale(self, n: int) -> int:
        return 2 * n

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    def phase(self, _: None) -> str:
        return self.host.phase

    def fail(self, _: None) -> None:
        raise OSError("planted")


class Special(Policy):
    def scale(self, n: int) -> int:
        return 3 * n


class Outer:
    class Engine:
        def name(self, suffix: str) -> str:
            return "engine" + suffix


def host_of(*workers: object) -> WorkerHost:
    host = WorkerHost()
    for worker in workers:
        host.add(worker)
    return host


def both(host: WorkerHost, n: int) -> tuple[int, str]:
    return host.get(Policy).scale(n), host.get(Outer.Engine).name("!")


def calls_phase(host: WorkerHost, _: None) -> tuple[str, str, str]:
    return host.phase, host.run(Policy.phase, None), host.phase


def calls_fail(host: WorkerHost, _: None) -> None:
    host.run(Policy.fail, None)


def test_a_method_runs_on_the_worker_of_its_class():
    host = host_of(Policy(), Outer.Engine())
    assert host.run(Policy.scale, 4) == 8
    assert host.run(Outer.Engine.name, "!") == "engine!"


def test_a_generator_method_gives_its_items_one_by_one():
    host = host_of(Policy())
    assert list(host.stream(Policy.count, 3)) == [0, 1, 2]
    assert host.run(Policy.count, 3) == [0, 1, 2]
    assert host.run(Policy.count, 0) == []
    assert list(host.stream(Policy.scale, 3)) == [6]


def test_a_module_level_function_gets_the_host():
    assert host_of(Policy(), Outer.Engine()).run(both, 5) == (10, "engine!")


def test_the_named_function_runs_also_where_a_derived_class_replaces_it():
    assert host_of(Special()).run(Policy.scale, 4) == 8
    assert host_of(Special()).run(Special.scale, 4) == 12


def test_the_worker_of_the_very_class_comes_before_a_derived_one():
    policy = Policy()
    assert host_of(Special(), policy).get(Policy) is policy


class Other(Policy):
    pass


def test_two_derived_workers_are_ambiguous():
    with pytest.raises(LookupError, match=r"2 workers that are a Policy.*Other, Special"):
        host_of(Special(), Other()).get(Policy)


def test_a_missing_worker_is_named_with_those_there_are():
    with pytest.raises(LookupError, match="no Policy; its workers: Engine"):
        host_of(Outer.Engine()).run(Policy.scale, 1)


def test_a_second_worker_of_a_class_is_refused():
    with pytest.raises(ValueError, match="has a Policy already"):
        host_of(Policy(), Policy())


def test_functions_that_another_rank_could_not_find_are_refused():
    host = host_of(Policy())
    for function in (host.get(Policy).scale, lambda worker, n: n, len):
        with pytest.raises(TypeError, match="wanted a method as its class holds it"):
            host.run(function, 1)


def test_the_phase_is_the_function_that_runs():
    host = host_of()
    host.add(Policy(host))
    assert host.phase == IDLE
    assert host.run(calls_phase, None) == ("calls_phase", "Policy.phase", "calls_phase")
    assert host.phase == IDLE
    items = host.stream(Policy.count, 2)
    next(items)
    assert host.phase == "Policy.count"


def test_after_an_error_the_phase_is_the_innermost_function():
    host = host_of(Policy())
    with pytest.raises(OSError, match="planted"):
        host.run(calls_fail, None)
    assert host.phase == "Policy.fail"
