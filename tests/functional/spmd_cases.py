"""What each rank of `test_spmd.py` runs: `torchrun --nproc-per-node 3 spmd_cases.py FOLDER CASE...`

The driver writes what it found to FOLDER/CASE.json. Several cases run at the same time, each in forks of the
ranks, so that one start of torchrun does for all; a rank writes its fork's exit status to FOLDER/CASE.RANK.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dapo.progress import PROGRESS
from megatron_dapo.runtime.group import RankStalledError, WorkerError
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl, SpmdGroup


@dataclass(frozen=True)
class Shard:
    name: str
    big: np.ndarray
    small: np.ndarray


MOST = 3000
STALL_SECONDS = 4.0
HEARD: set[int] = set()  # in the driver's process


class Worker:
    def __init__(self, rank: int, quick: dist.ProcessGroup | None):
        self.rank, self.quick = rank, quick

    def echo(self, value: Any) -> tuple[int, Any]:
        return self.rank, value

    def double(self, shard: Shard) -> Shard:
        shard.big[:] *= 2
        return Shard(shard.name + "!", shard.big, shard.small * 2)

    def count(self, n: int) -> Iterator[int]:
        for i in range(n):
            yield 10 * self.rank + i

    def talk(self, most: int) -> Iterator[str]:
        """Rank 0 goes on until the driver has heard another rank, or `most` times."""
        if self.rank > 0:
            yield "heard"
        else:
            for _ in range(most):
                if HEARD:
                    return
                time.sleep(0.01)
                yield "listening"

    def lock(self, _: None) -> Any:
        return lambda: None

    def fail_in_collective(self, how: str) -> None:
        if self.rank == 1:
            time.sleep(0.5)  # the peers are in the collective by now
            ENDINGS[how]()
        dist.all_reduce(torch.ones(1), group=self.quick if how == "sleep" else None)

    def end_soon(self, how: str) -> None:
        """After the answer, while no call is under way."""
        if self.rank == 1:
            threading.Timer(0.3, ENDINGS[how]).start()

    def end_on_rank_1(self, how: str) -> int:
        if self.rank == 1:
            ENDINGS[how]()
        return self.rank

    def stall(self, how: str) -> None:
        """Rank 1 does not come to the collective in which the others wait for it."""
        PROGRESS.step("micro-batch 3 of 8")
        if self.rank == 1:
            time.sleep(2)  # so that a beat has told the phase
            ENDINGS[how]()
        dist.all_reduce(torch.ones(1))

    def stall_driver(self, how: str) -> None:
        if self.rank == 0:
            time.sleep(2)
            ENDINGS[how]()
        dist.all_reduce(torch.ones(1))

    def write_for_long(self, seconds: float) -> Iterator[str]:
        """Rank 1 moves on without an answer to give, as a long rollout does; the others are through at once."""
        begun = time.monotonic()
        while self.rank == 1 and time.monotonic() - begun < seconds:
            PROGRESS.step("generation")
            yield ""
            time.sleep(0.5)

    def write_a_file(self, seconds: float) -> None:
        with PROGRESS.patient("a file is written"):
            time.sleep(seconds if self.rank == 1 else 0)
        dist.all_reduce(torch.ones(1))

    def fail_alone(self, _: None) -> None:
        if self.rank == 0:
            raise ValueError("rank 0 fails and the others wait for it")
        dist.all_reduce(torch.ones(1))


def _raise() -> None:
    raise ValueError("planted")


ENDINGS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(1000),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


class Unloadable:
    """It can be pickled, but not read back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return json.loads, ("{",)


def ask_host(host: WorkerHost, argument: int) -> tuple[str, int]:
    return host.phase, host.get(Worker).rank + argument


def healthy(group: SpmdGroup) -> dict[str, Any]:
    found: dict[str, Any] = {"size": group.size}
    found["scatter"] = group.call(Worker.echo, ["a", {"b": 1}, None])
    found["host"] = group.call(ask_host, [10, 20, 30])
    found["generators"] = group.call(Worker.count, [2, 0, 3])
    found["most_own_items"] = MOST
    for rank, _ in group.start(Worker.talk, [MOST] * 3):
        found["own_items"] = found.get("own_items", 0) + (rank == 0)
        HEARD.update({rank} - {0})
    found["plain_items"] = sorted(group.start(Worker.echo, [1, 2, 3]))

    handle = group.start(Worker.echo, [1, 2, 3])
    found["second_start"] = _error(lambda: group.start(Worker.count, [1, 1, 1]))
    found["after_second_start"] = handle.result()
    found["wrong_shards"] = _error(lambda: group.start(Worker.echo, [1, 2]))
    found["unpicklable"] = _error(lambda: group.call(Worker.echo, [1, 2, lambda: 3]))
    found["foreign"] = _error(lambda: group.call(Shard.__init__, [1, 2, 3]))
    handle = group.start(Worker.echo, [1, 2, 3])
    next(iter(handle))
    found["taken"] = _error(handle.result)
    found["rest"] = sorted(handle)

    shards = [Shard(str(i), np.full((1000, 2000), i, np.int64), np.arange(i)) for i in range(3)]
    frozen = np.full(100_000, 7, np.int64)
    frozen.flags.writeable = False
    doubled = group.call(Worker.double, shards)
    found["large"] = [[s.name, s.big.shape, bool((s.big == 2 * i).all()), s.small] for i, s in enumerate(doubled)]
    found["originals"] = [bool((s.big == i).all()) for i, s in enumerate(shards) if i > 0]
    found["frozen"] = [[rank, bool((array == 7).all())] for rank, array in group.call_all(Worker.echo, frozen)]
    return found


def _error(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def driver_fails(group: SpmdGroup) -> None:
    group.start(Worker.end_on_rank_1, ["sleep"] * 3)
    raise KeyError("the driver's own")


def signals_come(group: SpmdGroup) -> None:
    """To all ranks, as from a terminal. The call is whole on rank 1, so the signal did nothing there."""
    assert group.call_all(Worker.end_on_rank_1, "interrupt") == [0, 1, 2]
    assert group.call_all(Worker.end_on_rank_1, "terminate") == [0, 1, 2]
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def terminated(group: SpmdGroup) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def stall(group: SpmdGroup, how: str) -> None:
    group.on_stall(lambda aside: f"Aside: {_told(lambda: aside.call(Worker.echo, 'abc'))}.")
    group.call_all(Worker.stall, how)


def long_calls(group: SpmdGroup) -> dict[str, Any]:
    return {
        "rollout": len(group.call_all(Worker.write_for_long, 2 * STALL_SECONDS)[1]),
        "file": group.call_all(Worker.write_a_file, 2 * STALL_SECONDS),
    }


def _told(act: Callable[[], Any]) -> str:
    try:
        return str(act())
    except WorkerError as error:
        return f"WorkerError: {error}"


def end_between_calls(group: SpmdGroup, how: str) -> None:
    group.call_all(Worker.end_soon, how)
    time.sleep(1)
    group.call_all(Worker.echo)


CASES: dict[str, Callable[[SpmdGroup], Any]] = {
    "healthy": healthy,
    "start_up": lambda group: None,
    "raise": lambda group: group.call_all(Worker.fail_in_collective, "raise"),
    "kill": lambda group: group.call_all(Worker.fail_in_collective, "kill"),
    "own_part": lambda group: group.call_all(Worker.fail_alone),
    "unpicklable_result": lambda group: group.call_all(Worker.lock),
    "unpicklable_argument": lambda group: group.call_all(Worker.echo, Unloadable()),
    "killed_when_idle": lambda group: end_between_calls(group, "kill"),
    "hang": lambda group: group.call_all(Worker.end_on_rank_1, "sleep"),
    "hang_in_collective": lambda group: group.call_all(Worker.fail_in_collective, "sleep"),
    "frozen_when_idle": lambda group: end_between_calls(group, "freeze"),
    "driver_fails": driver_fails,
    "signals_come": signals_come,
    "terminated": terminated,
    "stalls": lambda group: stall(group, "sleep"),
    "stalls_frozen": lambda group: stall(group, "freeze"),
    "driver_stalls": lambda group: group.call_all(Worker.stall_driver, "sleep"),
    "driver_frozen": lambda group: group.call_all(Worker.stall_driver, "freeze"),
    "long_calls": long_calls,
    "driver_dies": lambda group: os.kill(os.getpid(), signal.SIGKILL),
}


# That a case has ended; else it is what the driver has found.
SIGNS = {"stalls_frozen": ".forced", "driver_stalls": ".forced", "driver_frozen": ".1"}
WATCHED = ("stalls", "stalls_frozen", "driver_stalls", "driver_frozen", "long_calls")


def run_case(folder: Path, case: str) -> None:
    found: dict[str, Any] = {}
    try:
        with SpmdControl.connect(
            timeout=2.0 if case in ("hang", "frozen_when_idle") else 60.0,
            stall_seconds=STALL_SECONDS if case in WATCHED else None,
            at_forced_end=lambda: (folder / f"{case}.forced").touch(),
        ) as control:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
            quick = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
            if case == "start_up" and control.rank == 1:
                raise ValueError("planted")
            dist.barrier()
            host = WorkerHost()
            host.add(Worker(control.rank, quick))
            if control.is_driver:
                found = CASES[case](control.group(host))
            else:
                control.serve(host)
    except RankStalledError as error:
        found = {"stalled": error.rank, "said": str(error)}
        raise
    except WorkerError as error:
        found = {"rank": error.rank, "phase": error.phase, "traceback": error.traceback}
        raise
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        if os.environ["RANK"] == "0":
            (folder / f"{case}.json").write_text(json.dumps(found, default=np.ndarray.tolist))


def run_in_fork(folder: Path, case: str) -> int:
    """The process that runs the case. Its ranks meet at a port of their own, as where the launcher keeps no store."""
    port = _agreed_port(folder / f"{case}.port")
    if child := os.fork():
        return child
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    status = 1
    try:
        run_case(folder, case)
        status = 0
    except SystemExit as error:
        status = int(str(error.code))
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _agreed_port(file: Path) -> str:
    """A free port, found by rank 0 and passed on through the file."""
    if os.environ["RANK"] == "0":
        file.with_suffix(".tmp").write_text(str(_free_port()))
        file.with_suffix(".tmp").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def _free_port() -> int:
    """Below those that the system gives to connections, or one of another case's could take it meanwhile."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def _status(child: int, sign: Path) -> int | str:
    """The exit status, minus a signal's number; a child that is there 5 s after a file says that others ended is
    killed."""
    deadline = math.inf
    while time.time() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if deadline == math.inf and sign.exists():
            deadline = sign.stat().st_mtime + 5
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "still there"


if __name__ == "__main__":
    where, *cases = sys.argv[1:]
    if len(cases) == 1:
        run_case(Path(where), cases[0])
    else:
        forks = {name: run_in_fork(Path(where), name) for name in cases}
        for name, process in forks.items():
            file = Path(where) / f"{name}.{os.environ['RANK']}"
            sign = file.with_suffix(SIGNS.get(name, ".json"))
            file.write_text(str(_status(process, sign)))
