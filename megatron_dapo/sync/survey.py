"""Who is there: the processes of both sides, their hosts and layouts, as the plan wants to know them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.parts import Processes
from megatron_dapo.sync.plan import EngineRank, Topology, TrainerRank
from megatron_dapo.workers.policy import PolicyWorker


@dataclass(frozen=True)
class PolicyFacts:
    hostname: str
    layout: RankLayout
    shape: ModelShape
    vpp_size: int | None


def policy_facts(host: WorkerHost, _: None) -> PolicyFacts:
    worker = host.get(PolicyWorker)
    virtual = worker.settings.megatron.virtual_pipeline_model_parallel_size
    return PolicyFacts(socket.gethostname(), worker.layout, worker.shape, virtual)


def hostname(host: WorkerHost, _: None) -> str:
    return socket.gethostname()


@dataclass(frozen=True)
class Ranks:
    """Policy and engines: one group whose every rank is both, or two groups. Each engine rank is a whole engine.

    In one group an engine over several devices lives on the first of as many ranks (`engine_every`); on the others is
    a `NoEngine`.
    """

    policy: WorkerGroup
    engines: WorkerGroup
    engine_every: int = 1

    @property
    def colocated(self) -> bool:
        return self.policy is self.engines

    @property
    def engine_ranks(self) -> range:
        """Of `engines`, those with an engine."""
        return range(0, self.engines.size, self.engine_every)

    @property
    def count(self) -> int:
        """Of processes: those of the policy, then those of the engines where they are others."""
        return self.policy.size + (0 if self.colocated else self.engines.size)

    @property
    def processes(self) -> Processes:
        first = 0 if self.colocated else self.policy.size
        return Processes(tuple(range(self.policy.size)), tuple(first + rank for rank in self.engine_ranks))

    def call(self, function: Callable[[WorkerHost, Any], Any], shards: Sequence[Any]) -> list[Any]:
        """[process] what `function(host, shards[process])` returns, all at the same time."""
        if self.colocated:
            return self.policy.call(function, shards)
        sending = self.policy.start(function, shards[: self.policy.size])
        receiving = self.engines.start(function, shards[self.policy.size :])
        pool = ThreadPoolExecutor(2)  # each side waits for the other: the first that fails is told
        both = [pool.submit(handle.result) for handle in (sending, receiving)]
        pool.shutdown(wait=False)
        for done in as_completed(both):
            done.result()
        return [result for side in both for result in side.result()]

    def call_all(self, function: Callable[[WorkerHost, Any], Any], argument: Any = None) -> list[Any]:
        return self.call(function, [argument] * self.count)


@dataclass(frozen=True)
class Survey:
    facts: tuple[PolicyFacts, ...]  # [trainer rank]
    hosts: tuple[str, ...]  # [process]

    @property
    def shape(self) -> ModelShape:
        return self.facts[0].shape

    @cached_property
    def one_host(self) -> bool:
        return len(set(self.hosts)) == 1

    @property
    def whole_on_each_rank(self) -> bool:
        """Whether each trainer rank holds the whole model."""
        layout = self.facts[0].layout
        return layout.tp_size == layout.pp_size == 1

    def topology(self, processes: Processes, each_its_own_node: bool = False) -> Topology:
        names = sorted(set(self.hosts))
        nodes = [process if each_its_own_node else names.index(host) for process, host in enumerate(self.hosts)]
        layout = self.facts[0].layout
        return Topology(
            trainer=tuple(
                TrainerRank(facts.layout.tp_rank, facts.layout.pp_rank, nodes[process])
                for facts, process in zip(self.facts, processes.trainer, strict=True)
            ),
            engines=tuple(EngineRank(n, 0, 1, nodes[process]) for n, process in enumerate(processes.engines)),
            tp_size=layout.tp_size,
            pp_size=layout.pp_size,
            vpp_size=self.facts[0].vpp_size,
        )


def survey(ranks: Ranks) -> Survey:
    return Survey(tuple(ranks.policy.call_all(policy_facts)), tuple(ranks.call_all(hostname)))
