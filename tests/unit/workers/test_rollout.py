"""Engines behind one object: real ones in a group of one, and scripted ranks that show who gets what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dapo.mcore.hf_read import read_hf
from megatron_dapo.rollout.no_engine import NoEngine
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.types import Completion, Request
from megatron_dapo.workers.rollout import RolloutFleet, RolloutWorker
from tests.unit.workers.one_rank import engine_of, requests_of


def no_failures() -> None:
    raise AssertionError("no engine has failed")


class Stop(Exception):  # noqa: N818  (it is no error)
    pass


@pytest.fixture
def engine(model: Path) -> TorchEngine:
    engine = engine_of(model, max_num_seqs=4)
    engine.load_weights(read_hf(model), version=3)
    return engine


@pytest.fixture
def fleet_of(engine: TorchEngine) -> Iterator[Callable[..., RolloutFleet]]:
    with SpmdControl.connect() as control:
        host = WorkerHost()
        host.add(RolloutWorker(engine))
        yield lambda checkpoint=lambda: None: RolloutFleet(control.group(host), checkpoint, no_failures)


def drain(engine: RolloutFleet | TorchEngine) -> list[Completion]:
    found = []
    while engine.pending:
        found += engine.poll()
    return found


def names(items: Sequence[Request | Completion]) -> list[tuple[int, int]]:
    return sorted((item.draw_index, item.sample_index) for item in items)


def as_dict(completions: Sequence[Completion]) -> dict[tuple[int, int], tuple[list[int], list[float], str, int]]:
    return {
        (c.draw_index, c.sample_index): (c.token_ids.tolist(), c.logprobs.tolist(), c.finish_reason, c.weight_version)
        for c in completions
    }


def test_every_request_comes_back_once_as_the_engine_itself_writes_it(
    fleet_of: Callable[..., RolloutFleet], model: Path
):
    requests = requests_of(draws=3, n=2)
    fleet = fleet_of()
    fleet.submit(requests)
    assert fleet.pending == 6
    found = drain(fleet)
    assert names(found) == names(requests)
    assert fleet.tokens_written == sum(len(completion.token_ids) for completion in found)

    alone = engine_of(model, max_num_seqs=4)
    alone.load_weights(read_hf(model), version=3)
    alone.submit(requests)
    assert as_dict(found) == as_dict(drain(alone))


def test_calls_take_turns_and_are_never_mixed(fleet_of: Callable[..., RolloutFleet]):
    calls = [requests_of(2, 1), requests_of(1, 3, first_draw=2), requests_of(1, 1, first_draw=3)]
    fleet = fleet_of()
    for call in calls:
        fleet.submit(call)
    assert fleet.pending == 6
    found = drain(fleet)
    parts = [found[:2], found[2:5], found[5:]]
    assert [names(part) for part in parts] == [names(call) for call in calls]


def test_an_empty_call_and_an_idle_poll_do_nothing(fleet_of: Callable[..., RolloutFleet]):
    fleet = fleet_of()
    assert fleet.poll() == []
    fleet.submit([])
    fleet.submit(requests_of(1, 1))
    assert fleet.pending == 1
    assert names(drain(fleet)) == [(0, 0)]
    assert fleet.poll() == []


def test_an_abort_drops_everything_and_leaves_the_ranks_idle(
    fleet_of: Callable[..., RolloutFleet], engine: TorchEngine
):
    fleet = fleet_of()
    fleet.submit(requests_of(4, 4))
    fleet.submit(requests_of(1, 1, first_draw=9))
    assert fleet.poll()
    written = fleet.tokens_written
    fleet.abort()
    assert fleet.pending == engine.pending == 0
    assert fleet.poll() == []
    assert fleet.tokens_written == written
    fleet.submit(requests_of(2, 1, first_draw=20))
    assert names(drain(fleet)) == [(20, 0), (21, 0)]


def test_an_abort_before_and_after_all_work_is_harmless(fleet_of: Callable[..., RolloutFleet]):
    fleet = fleet_of()
    fleet.abort()
    fleet.submit(requests_of(1, 2))
    fleet.abort()
    fleet.submit(requests_of(1, 2))
    assert len(drain(fleet)) == 2
    fleet.abort()
    assert fleet.pending == 0


def test_what_the_checkpoint_raises_ends_the_rollout_and_another_call_can_start(
    fleet_of: Callable[..., RolloutFleet], engine: TorchEngine, model: Path
):
    polls = 0

    def checkpoint() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            raise Stop

    fleet = fleet_of(checkpoint)
    fleet.submit(requests_of(4, 4))
    with pytest.raises(Stop):
        drain(fleet)
    assert polls == 3
    fleet.abort()
    assert engine.pending == 0
    engine.load_weights(read_hf(model), version=4)
    fleet.submit(requests_of(1, 1))
    assert {completion.weight_version for completion in drain(fleet)} == {4}


@dataclass
class ScriptedGroup:
    """`size` ranks that return what they are given, last rank first."""

    size: int
    shards: list[list[list[Request]]] = field(default_factory=list)

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> Iterator[tuple[int, list[Completion]]]:
        assert method is RolloutWorker.generate
        self.shards.append([list(shard) for shard in shards])
        for rank in reversed(range(self.size)):
            for request in shards[rank]:
                ids = np.zeros(2, np.int64)
                completion = Completion(request.draw_index, request.sample_index, ids, np.zeros(2), "stop", 0)
                yield rank, [completion]

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        raise NotImplementedError


def test_responses_to_one_draw_share_a_rank_and_draws_go_round():
    group = ScriptedGroup(3)
    fleet = RolloutFleet(group, lambda: None, no_failures)
    requests = requests_of(draws=5, n=2, first_draw=10)
    fleet.submit(requests)
    assert names(drain(fleet)) == names(requests)
    assert fleet.tokens_written == 20
    (shards,) = group.shards
    assert [[request.draw_index for request in shard] for shard in shards] == [
        [10, 10, 13, 13],
        [11, 11, 14, 14],
        [12, 12],
    ]


def test_more_ranks_than_draws_leave_some_with_nothing():
    group = ScriptedGroup(4)
    fleet = RolloutFleet(group, lambda: None, no_failures)
    fleet.submit(requests_of(draws=1, n=3))
    assert len(drain(fleet)) == 3
    assert [len(shard) for shard in group.shards[0]] == [3, 0, 0, 0]


def test_ranks_whose_devices_serve_another_ranks_engine_get_no_requests():
    group = ScriptedGroup(4)
    fleet = RolloutFleet(group, lambda: None, no_failures, engine_every=2)
    fleet.submit(requests_of(draws=3, n=2))
    drain(fleet)
    assert [sorted({request.draw_index for request in shard}) for shard in group.shards[0]] == [[0, 2], [], [1], []]


def test_a_rank_without_an_engine_refuses_requests():
    with pytest.raises(RuntimeError, match="2 requests for a rank without an engine"):
        NoEngine().submit(requests_of(draws=1, n=2))
