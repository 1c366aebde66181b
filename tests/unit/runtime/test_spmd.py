"""A group of one: the same calls, but nothing is connected, sent or pickled. `functional/test_spmd.py` has the rest."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dapo.runtime.group import WorkerError
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl, SpmdGroup


class Worker:
    def __init__(self) -> None:
        self.calls = 0

    def echo(self, value: Any) -> Any:
        self.calls += 1
        return value

    def count(self, n: int) -> Iterator[int]:
        for i in range(n):
            self.calls += 1
            yield i

    def act(self, action: Callable[[], None]) -> None:
        action()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def group(worker: Worker) -> Iterator[SpmdGroup]:
    with SpmdControl.connect() as control:
        host = WorkerHost()
        host.add(worker)
        yield control.group(host)


def test_a_process_alone_drives_and_connects_nothing(group: SpmdGroup):
    with SpmdControl.connect() as control:
        assert (control.rank, control.size, control.is_driver) == (0, 1, True)
    assert group.size == 1
    assert not dist.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_arguments_and_results_are_handed_over_as_they_are(group: SpmdGroup):
    value = [lambda: None]
    assert group.call(Worker.echo, [value])[0] is value
    assert group.call_all(Worker.echo, value)[0] is value
    assert group.call_all(Worker.echo) == [None]


def test_a_generator_method_gives_a_list_or_a_stream(group: SpmdGroup):
    assert group.call(Worker.count, [3]) == [[0, 1, 2]]
    assert list(group.start(Worker.count, [3])) == [(0, 0), (0, 1), (0, 2)]
    assert list(group.start(Worker.echo, ["x"])) == [(0, "x")]


def test_the_own_part_runs_as_it_is_asked_for(group: SpmdGroup, worker: Worker):
    handle = group.start(Worker.count, [3])
    assert worker.calls == 0
    next(iter(handle))
    assert worker.calls == 1
    assert list(handle) == [(0, 1), (0, 2)]


def test_one_call_at_a_time(group: SpmdGroup):
    handle = group.start(Worker.echo, [1])
    with pytest.raises(RuntimeError, match=r"cannot start Worker.count: Worker.echo is not finished; take its result"):
        group.start(Worker.count, [1])
    assert handle.result() == [1]
    assert group.call(Worker.count, [1]) == [[0]]


def test_items_that_were_taken_are_not_in_a_result(group: SpmdGroup):
    handle = group.start(Worker.count, [2])
    next(iter(handle))
    with pytest.raises(RuntimeError, match=r"items of Worker.count were taken already"):
        handle.result()


def test_shards_must_be_as_many_as_ranks(group: SpmdGroup):
    with pytest.raises(ValueError, match=r"Worker.echo: 2 shards for 1 ranks; give one to each"):
        group.start(Worker.echo, [1, 2])


def test_a_method_of_no_worker_here_is_refused_at_the_start(group: SpmdGroup):
    with pytest.raises(LookupError, match="no SpmdGroup; its workers: Worker"):
        group.start(SpmdGroup.call_all, [None])


def fail() -> None:
    raise OSError("planted")


def test_an_error_names_rank_and_phase_and_keeps_its_cause(group: SpmdGroup):
    with pytest.raises(
        WorkerError, match=r"(?s)rank 0 failed in Worker.act:\nTraceback.*in fail\n.*OSError: planted"
    ) as raised:
        group.call(Worker.act, [fail])
    assert isinstance(raised.value.__cause__, OSError)
    assert (raised.value.rank, raised.value.phase) == (0, "Worker.act")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupt_stays_an_interrupt(group: SpmdGroup):
    with pytest.raises(KeyboardInterrupt):
        group.call(Worker.act, [interrupt])


def test_rank_0_does_not_serve():
    with SpmdControl.connect() as control, pytest.raises(RuntimeError, match="rank 0 cannot serve"):
        control.serve(WorkerHost())
