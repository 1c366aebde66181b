"""Which process is which where policy and engines share ranks, where they do not, and where a side fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.runtime.group import Handle
from megatron_dapo.sync.parts import Processes
from megatron_dapo.sync.plan import EngineRank, TrainerRank
from megatron_dapo.sync.survey import PolicyFacts, Ranks, Survey
from tests.unit.sync.layouts import model_shape


class Threads:
    """A group whose ranks are threads: each method gets its rank's name in place of a host."""

    def __init__(self, name: str, size: int):
        self.name, self.size = name, size

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> Handle:
        return Running([(method, f"{self.name}{rank}", shard) for rank, shard in enumerate(shards)])

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        return self.start(method, shards).result()


class Running:
    def __init__(self, calls: Sequence[tuple[Callable[..., Any], str, Any]]):
        self._found: list[Any] = [None] * len(calls)
        self._threads = [threading.Thread(target=self._run, args=(n, *call)) for n, call in enumerate(calls)]
        for thread in self._threads:
            thread.start()

    def result(self) -> list[Any]:
        for thread in self._threads:
            thread.join(30)
        if failed := [found for found in self._found if isinstance(found, Exception)]:
            raise failed[0]
        return self._found

    def cancel(self) -> None: ...

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return iter(enumerate(self.result()))

    def _run(self, number: int, method: Callable[..., Any], host: str, shard: Any) -> None:
        try:
            self._found[number] = method(host, shard)
        except Exception as error:
            self._found[number] = error


def layout(tp_rank: int = 0, tp_size: int = 1, pp_rank: int = 0, pp_size: int = 1) -> RankLayout:
    places = {"tp_rank": tp_rank, "tp_size": tp_size, "pp_rank": pp_rank, "pp_size": pp_size}
    return RankLayout(**places, cp_rank=0, cp_size=1, dp_rank=0, dp_size=1)


def facts(hostname: str, layout: RankLayout) -> PolicyFacts:
    return PolicyFacts(hostname, layout, model_shape(), None)


def test_in_one_group_an_engine_over_two_devices_is_on_every_second_process() -> None:
    group = Threads("rank", 4)
    ranks = Ranks(group, group, engine_every=2)
    assert (ranks.colocated, ranks.count) == (True, 4)
    assert ranks.processes == Processes((0, 1, 2, 3), (0, 2))


def test_engines_of_their_own_come_after_the_policy() -> None:
    ranks = Ranks(Threads("policy", 2), Threads("engine", 3))
    assert (ranks.colocated, ranks.count) == (False, 5)
    assert ranks.processes == Processes((0, 1), (2, 3, 4))
    said = ranks.call(lambda host, shard: f"{host}:{shard}", "abcde")
    assert said == ["policy0:a", "policy1:b", "engine0:c", "engine1:d", "engine2:e"]


def test_both_sides_work_at_the_same_time() -> None:
    """Each waits for all of the other: one after the other they would never come through."""
    together = threading.Barrier(3)
    ranks = Ranks(Threads("policy", 1), Threads("engine", 2))
    ranks.call_all(lambda host, _: together.wait(20))


def test_a_side_that_fails_is_told_while_the_other_still_waits_for_it() -> None:
    never = threading.Event()

    def work(host: str, _: None) -> None:
        if host == "engine0":
            raise ConnectionError("no weights for engine 0")
        never.wait(25)

    with pytest.raises(ConnectionError, match="no weights for engine 0"):
        Ranks(Threads("policy", 1), Threads("engine", 1)).call_all(work)
    assert not never.is_set()
    never.set()


def test_nodes_of_the_plan_are_the_hosts() -> None:
    seen = Survey(
        (facts("b", layout(tp_rank=0, tp_size=2)), facts("b", layout(tp_rank=1, tp_size=2))), ("b", "b", "a", "b")
    )
    found = seen.topology(Processes((0, 1), (2, 3)))
    assert found.trainer == (TrainerRank(0, 0, 1), TrainerRank(1, 0, 1))
    assert found.engines == (EngineRank(0, 0, 1, 0), EngineRank(1, 0, 1, 1))
    assert (found.tp_size, found.pp_size) == (2, 1)
    assert (seen.one_host, seen.whole_on_each_rank) == (False, False)


def test_for_a_broadcast_on_one_host_every_process_is_a_node() -> None:
    seen = Survey((facts("a", layout()),), ("a", "a"))
    assert (seen.one_host, seen.whole_on_each_rank) == (True, True)
    found = seen.topology(Processes((0,), (0, 1)), each_its_own_node=True)
    assert [rank.node for rank in (*found.trainer, *found.engines)] == [0, 0, 1]
