"""Ray: this process drives, and each rank is an actor of its own.

    with RayRuntime.connect(address=None) as runtime:
        (group,) = runtime.groups([Share(nodes=1, ranks_per_node=2, build=partial(build_host, config))])
        group.call_all(PolicyWorker.rank_layout)

All ranks are placed together or not at all, a node's share of a group on one node. An actor gets the environment that
torchrun would give its rank, so what runs in it does not know who started it. Arguments go through Ray's object store,
one object for each distinct shard: their arrays are read where they lie, and are read-only.

A rank that raises or dies becomes a `WorkerError` on the driver. The other ranks may then wait for it in a collective
for ever: leaving the runtime ends all of them. Ray does the same when the driver is killed. With `stall_seconds` a
rank that stands still while others wait for it is a `RankStalledError` (`watch.py`).

What is left out: restarting an actor. A group with a failed rank is done for; the run is started again and resumes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_dapo.progress import IDLE, PROGRESS, START_UP
from megatron_dapo.runtime.cluster import HINT, LOGS, ClusterError, check_answers
from megatron_dapo.runtime.devices import ENGINE_DEVICES, own_and_after
from megatron_dapo.runtime.group import RankStalledError, WorkerError, rank_name
from megatron_dapo.runtime.handle import CallHandle, check_start
from megatron_dapo.runtime.host import WorkerHost, phase_of
from megatron_dapo.runtime.placement import Placement, PlacementError, no_room
from megatron_dapo.runtime.pulse import Pulse, WatchAddress
from megatron_dapo.runtime.stall import Elsewhere
from megatron_dapo.runtime.watch import AsideGroup, LastWill, Watch

ECHO_SECONDS = 3.0  # by which Ray's news of a death may come after the errors that the death caused


@dataclass(frozen=True)
class Share:
    """The ranks of one group, and what each builds: nodes x ranks_per_node."""

    nodes: int
    ranks_per_node: int
    build: Callable[[], WorkerHost]
    devices_per_rank: int = 1  # GPUs, or CPUs where there are no GPUs
    name: str = ""  # of the group, where there are several


def put(shards: Sequence[Any]) -> list[ray.ObjectRef]:
    """[rank] its shard in the object store: one object where ranks share a shard, the same one by identity."""
    kept = {id(shard): ray.put(shard) for shard in {id(shard): shard for shard in shards}.values()}
    return [kept[id(shard)] for shard in shards]


class RayRuntime:
    """A connection to a cluster, and the groups on it. Made by `connect`, used as a context."""

    def __init__(self, placement_timeout: float, timeout: float, stall_seconds: float | None = None):
        self._placement_timeout, self._timeout, self._stall_seconds = placement_timeout, timeout, stall_seconds
        self._ending = _Ending()
        self._places: list[PlacementGroup] = []

    @classmethod
    def connect(
        cls,
        address: str | None,
        placement_timeout: float = 60.0,
        timeout: float = 1800.0,
        stall_seconds: float | None = None,
    ) -> RayRuntime:
        """
        Args:
            address: of a cluster (`auto`: the one that runs on this machine); None starts one on this machine alone.
            placement_timeout: seconds that a group waits for its place.
            timeout: seconds that the driver waits without hearing from any rank.
            stall_seconds: for which a rank may stand still while others wait for it; None: nobody looks.

        Raises:
            ClusterError: no cluster answers there, Ray cannot join it, or cannot start here.
        """
        if address is None:
            _init("Ray does not start on this machine", LOGS, address="local", include_dashboard=False)
        else:
            check_answers(address)
            _init(f"Ray cannot join the cluster at {address}", HINT, address=address)
        return cls(placement_timeout, timeout, stall_seconds)

    def groups(self, wanted: Sequence[Share]) -> list[RayGroup]:
        """Place the ranks of all groups together or none, and have each rank build its workers, group by group.

        Raises:
            PlacementError: the cluster has no room for them in time.
            WorkerError: a rank failed in `build`.
        """
        device = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        placements = [Placement(each.nodes, each.ranks_per_node, device, each.devices_per_rank) for each in wanted]
        place = _place(placements, self._placement_timeout)
        self._places.append(place)
        made, first_bundle = [], 0
        for placement, share in zip(placements, wanted, strict=True):
            group = RayGroup(
                share.name, placement, place, first_bundle, self._timeout, self._ending, self._stall_seconds
            )
            self._ending.groups.append(group)
            group.build(share.build)
            made.append(group)
            first_bundle += placement.nodes
        return made

    def __enter__(self) -> RayRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        ray.shutdown()

    def close(self) -> None:
        """End the groups, and not the connection."""
        for group in self._ending.groups:
            group.close()
        while self._places:
            remove_placement_group(self._places.pop())


class _Ending:
    """A stall in one group of a run ends them all: the driver may be waiting for another one."""

    def __init__(self) -> None:
        self.groups: list[RayGroup] = []
        self._stall: RankStalledError | None = None
        self._is_raised = threading.Event()

    def fail(self, stall: RankStalledError) -> threading.Event:
        """End all ranks, so that the driver gets an error where it waits; `check` then makes it this one."""
        self._stall = stall
        for group in self.groups:
            group.kill()
        return self._is_raised

    def elsewhere(self, group: RayGroup) -> Elsewhere:
        """As the watch of `group` is to know it. Groups that were called last for the same do it together: one that is
        through with its part waits for the others."""
        others = [(other, other.watch) for other in self.groups if other is not group and other.watch is not None]
        waiting = [each.name for each, watch in others if watch.somebody_waits(each.called is group.called)]
        return Elsewhere(tuple(waiting), any(watch.somebody_works() for _, watch in others))

    def check(self) -> None:
        """Raises RankStalledError: a rank has stalled."""
        if self._stall is not None:
            self._is_raised.set()
            raise self._stall


class RayGroup:
    """A `WorkerGroup` of actors. `called`: the function of its last call."""

    def __init__(
        self,
        name: str,
        placement: Placement,
        place: PlacementGroup,
        first_bundle: int,
        timeout: float,
        ending: _Ending,
        stall_seconds: float | None,
    ):
        """
        Args:
            first_bundle: of `place`, the one where this group's bundles begin.
            ending: of all groups of the run.
            stall_seconds: see `RayRuntime.connect`.
        """
        self.name, self.size = name, placement.size
        self.called: Callable[..., Any] | None = None
        self._placement, self._timeout, self._ending = placement, timeout, ending
        self.watch: Watch | None = None
        if stall_seconds is not None:
            self.watch = Watch(
                self.size, stall_seconds, ending.fail, group=name, elsewhere=lambda: ending.elsewhere(self)
            )
        self._busy: str | None = None
        taken = placement.of_a_rank()
        actor_class: Any = ray.remote(num_cpus=taken["CPU"], num_gpus=taken.get("GPU", 0))(_Rank)

        def bundle(rank: int) -> PlacementGroupSchedulingStrategy:
            return PlacementGroupSchedulingStrategy(place, first_bundle + rank // placement.ranks_per_node)

        self._ranks: list[Any] = [
            actor_class.options(scheduling_strategy=bundle(rank)).remote(rank, name) for rank in range(self.size)
        ]

    def build(self, build: Callable[[], WorkerHost]) -> None:
        """Give every rank its environment and its workers. Errors as for `RayRuntime.groups`."""
        opened = self._ranks[0].open_store.options(num_returns="streaming").remote()
        ((_, (address, port)),) = self._arrivals({opened: 0}, START_UP)
        environments = [self._placement.environment(rank, address, port) for rank in range(self.size)]
        if self._placement.device == "GPU":
            asked = {rank.devices.options(num_returns="streaming").remote(): n for n, rank in enumerate(self._ranks)}
            seen = dict(self._arrivals(asked, START_UP))
            told = own_and_after([seen[rank] for rank in range(self.size)], self._placement.ranks_per_node)
            environments = [each | {ENGINE_DEVICES: more} for each, more in zip(environments, told, strict=True)]
        watch = None if self.watch is None else self.watch.address(ray.util.get_node_ip_address())
        calls = {
            actor.build.options(num_returns="streaming").remote(environments[rank], build, watch): rank
            for rank, actor in enumerate(self._ranks)
        }
        list(self._arrivals(calls, START_UP))

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> CallHandle:
        """All ranks begin at once. See `WorkerGroup.start`; what a rank has no worker for is its `WorkerError`.

        Raises:
            ValueError: len(shards) is not `size`.
            RuntimeError: the call before this one was not finished.
            RankStalledError: a rank has stalled.
        """
        self._ending.check()
        check_start(method, shards, self.size, self._busy)
        calls = {
            actor.stream.options(num_returns="streaming").remote(method, reference): rank
            for rank, (actor, reference) in enumerate(zip(self._ranks, put(shards), strict=True))
        }
        self._busy, self.called = phase_of(method), method
        return CallHandle(self.size, method, self._until_the_end(calls, self._busy))

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        """start(...).result()"""
        return self.start(method, shards).result()

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        """The same argument on every rank."""
        return self.call(method, [argument] * self.size)

    def on_stall(self, last_will: LastWill) -> None:
        """See `WorkerGroup.on_stall`; a stall in another group of the run counts too."""
        for group in self._ending.groups:
            if group.watch is not None:
                group.watch.last_will = last_will if group is self else lambda _: last_will(self._aside())

    def _aside(self) -> AsideGroup:
        assert self.watch is not None
        return AsideGroup(self.watch, self.size, None)

    def close(self) -> None:
        """End every rank. What hangs is ended too."""
        if self.watch is not None:
            self.watch.close()
        self.kill()

    def kill(self) -> None:
        """`close`, and nothing of the watch, which may itself be what calls."""
        for actor in self._ranks:
            ray.kill(actor)

    def _until_the_end(self, calls: dict[Any, int], phase: str) -> Iterator[tuple[int, Any]]:
        yield from self._arrivals(calls, phase)
        self._busy = None

    def _arrivals(self, calls: dict[Any, int], phase: str) -> _Arrivals:
        return _Arrivals(calls, phase, self.name, self._timeout, self._ending.check)


class _Arrivals:
    """What the ranks' generators yield, in the order in which it arrives."""

    def __init__(self, calls: dict[Any, int], phase: str, group: str, timeout: float, check: Callable[[], None]):
        """`check` raises if a rank has stalled: its end, and its peers', then have that reason."""
        self._open, self._phase, self._group, self._timeout, self._check = calls, phase, group, timeout, check

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while self._open:
            ready, _ = ray.wait(list(self._open), timeout=self._timeout)
            if not ready:
                ranks = ", ".join(f"rank {rank}" for rank in self._open.values())
                why = f"no answer for {self._timeout:g} s from {ranks}"
                raise WorkerError(min(self._open.values()), self._phase, why, self._group)
            yield from self._next(_generator(ready[0]))

    def _next(self, call: Any) -> Iterator[tuple[int, Any]]:
        """The next value of a call that has one, or nothing if it is through."""
        rank = self._open[call]
        try:
            item = ray.get(next(call))
        except StopIteration:
            del self._open[call]
            return
        except RayError as error:
            self._check()
            raise self._first_cause(rank, error) from None
        yield rank, item

    def _first_cause(self, rank: int, error: RayError) -> WorkerError:
        """A rank that dies breaks the collectives of its peers, and their errors may be here before the news of it."""
        deadline = time.monotonic() + ECHO_SECONDS
        others = {call: other for call, other in self._open.items() if other != rank}
        while others and _may_be_an_echo(error) and time.monotonic() < deadline:
            ready, _ = ray.wait(list(others), timeout=max(0.0, deadline - time.monotonic()))
            for call in map(_generator, ready):
                try:
                    ray.get(next(call))
                except StopIteration:
                    del others[call]
                except RayActorError as death:
                    return self._named(others[call], death)
                except RayError:
                    del others[call]
        return self._named(rank, error)

    def _named(self, rank: int, error: RayError) -> WorkerError:
        if isinstance(error, RayTaskError):
            return WorkerError(rank, self._phase, str(error), self._group)
        died = f"{rank_name(rank, self._group)} died without a report. Ray says: {error}"
        return WorkerError(rank, self._phase, died, self._group)


class _Rank:
    """What runs in an actor's process."""

    def __init__(self, rank: int, group: str):
        self._rank, self._group = rank, group
        signal.signal(signal.SIGINT, _leave_to_the_driver)

    def __repr__(self) -> str:
        """Ray puts it before each line that the rank prints."""
        return rank_name(self._rank, self._group)

    def open_store(self) -> Iterator[tuple[str, int]]:
        """Serve the store in which the ranks find each other, on a port that the system chooses: no two runs meet."""
        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        yield address, self._store.port

    def devices(self) -> Iterator[str]:
        yield os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def build(
        self, environment: dict[str, str], build: Callable[[], WorkerHost], watch: WatchAddress | None
    ) -> Iterator[None]:
        os.environ.update(environment)
        self._host = build()
        PROGRESS.enter(IDLE)
        if watch is not None:
            Pulse(self._rank, watch, lambda: self._host)
        yield None

    def stream(self, function: Callable[..., Any], argument: Any) -> Iterator[Any]:
        yield from self._host.stream(function, argument)


def _init(failed: str, remedy: str, **settings: Any) -> None:
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises many kinds, Exception itself among them
        raise ClusterError(f"{failed}: {error}\n{remedy}") from error


def _place(placements: Sequence[Placement], seconds: float) -> PlacementGroup:
    place = placement_group([bundle for each in placements for bundle in each.bundles()], strategy="PACK")
    if place.wait(seconds):
        return place
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    message = no_room(placements, nodes, ray.available_resources(), seconds)
    remove_placement_group(place)
    raise PlacementError(message)


def _generator(ready: Any) -> Any:
    """Ray waits for generators too, which its type hints do not say."""
    return ready


def _may_be_an_echo(error: RayError) -> bool:
    """Whether another rank's death may have caused it: a broken collective is a RuntimeError."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, RuntimeError)


def _leave_to_the_driver(number: int, frame: Any) -> None:
    """Ctrl-C in a terminal reaches every process of a local cluster; it is the driver's to act on."""
