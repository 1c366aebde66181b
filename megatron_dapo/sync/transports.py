"""Which transport carries a run's weights: one visible table, and the rule behind `auto`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_dapo.config.tree import ConfigError, WeightSyncConfig
from megatron_dapo.sync.embedded import EmbeddedSync, WeightSync
from megatron_dapo.sync.plan import Plan, make_plan
from megatron_dapo.sync.restoring import RestoringSync
from megatron_dapo.sync.staged import StagedSync
from megatron_dapo.sync.survey import Ranks, Survey, survey
from megatron_dapo.sync.verify import Probe, VerifiedSync
from megatron_dapo.workers.policy_group import PolicyGroup

_KEY = "actor_rollout_ref.rollout.weight_sync.transport"


def _in_process(ranks: Ranks, plan: Plan, seen: Survey, bucket_bytes: int) -> WeightSync:
    if not ranks.colocated:
        raise ConfigError(f"{_KEY} is in_process: engines and policy live in different processes; use auto")
    return EmbeddedSync(ranks.policy)


def _shared_memory(ranks: Ranks, plan: Plan, seen: Survey, bucket_bytes: int) -> WeightSync:
    _check_one_host("shared_memory", seen)
    return StagedSync(ranks, plan, seen, "host", bucket_bytes)


def _broadcast(ranks: Ranks, plan: Plan, seen: Survey, bucket_bytes: int) -> WeightSync:
    return StagedSync(ranks, plan, seen, "host", bucket_bytes)


def _cuda_ipc(ranks: Ranks, plan: Plan, seen: Survey, bucket_bytes: int) -> WeightSync:
    _check_one_host("cuda_ipc", seen)
    if not torch.cuda.is_available():
        raise ConfigError(f"{_KEY} is cuda_ipc and there is no CUDA device here; use auto")
    return StagedSync(ranks, plan, seen, "cuda", bucket_bytes)


TRANSPORTS: dict[str, Callable[[Ranks, Plan, Survey, int], WeightSync]] = {
    "in_process": _in_process,
    "shared_memory": _shared_memory,
    "broadcast": _broadcast,
    "cuda_ipc": _cuda_ipc,
}


def choose(transport: str, ranks: Ranks, seen: Survey) -> str:
    """`auto`: in process where every rank has the whole model beside its engine, else through the host's memory, else,
    over several hosts, by broadcast between them."""
    if transport != "auto":
        return transport
    if ranks.colocated and seen.whole_on_each_rank:
        return "in_process"
    return "shared_memory" if seen.one_host else "broadcast"


def make_weight_sync(
    ranks: Ranks,
    policy: PolicyGroup,
    config: WeightSyncConfig,
    dtype: torch.dtype,
    probe: Probe,
    say: Callable[[str], None],
) -> VerifiedSync:
    """The way for a whole run; collective over all ranks. `say` is told of every engine that is started again.

    Raises:
        ConfigError: the transport that is asked for cannot work here.
    """
    seen = survey(ranks)
    name = choose(config.transport, ranks, seen)
    # On one host there is nothing to broadcast between: each process counts as a node of its own.
    apart = name == "broadcast" and seen.one_host
    plan = make_plan(seen.shape, seen.topology(ranks.processes, each_its_own_node=apart), dtype.itemsize)
    inner = TRANSPORTS[name](ranks, plan, seen, config.bucket_bytes)
    restoring = RestoringSync(inner, ranks.engines, say)
    return VerifiedSync(restoring, ranks, policy, plan, dtype, probe, config.verify_every)


def _check_one_host(name: str, seen: Survey) -> None:
    if not seen.one_host:
        raise ConfigError(f"{_KEY} is {name} and the ranks are on {len(set(seen.hosts))} hosts; use broadcast or auto")
