"""Which transport a run gets, and the one-process run through each that a CPU has: `VerifiedSync` as assembled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.config.tree import ConfigError, WeightSyncConfig
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.rollout.engine import RolloutEngine
from megatron_dapo.rollout.failures import EngineDiedError
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdGroup
from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.survey import PolicyFacts, Ranks, Survey
from megatron_dapo.sync.transports import TRANSPORTS, choose, make_weight_sync
from megatron_dapo.sync.verify import Probe, VerifiedSync
from megatron_dapo.workers.policy import PolicyWorker
from megatron_dapo.workers.policy_group import MicroBatchLimits, PassLimits, PolicyGroup
from megatron_dapo.workers.rollout import RolloutWorker
from tests.functional.tiny_models import VOCAB
from tests.unit.sync.layouts import model_shape

PROBE = Probe(VOCAB, 8, 8, temperature=1.0, tolerance=1e-4)
LAYOUT = RankLayout(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, cp_rank=0, cp_size=1, dp_rank=0, dp_size=2)


class Apart:
    """Two groups that are not the same."""

    size = 2


def seen(*hosts: str, **layout: int) -> Survey:
    return Survey(tuple(PolicyFacts(h, replace(LAYOUT, **layout), model_shape(), None) for h in hosts), hosts)


@pytest.mark.parametrize(
    "survey, colocated, wanted",
    [
        (seen("a", "a"), True, "in_process"),
        (seen("a", "b"), True, "in_process"),
        (seen("a", "a"), False, "shared_memory"),
        (seen("a", "a", tp_size=2), True, "shared_memory"),
        (seen("a", "a", pp_size=2), True, "shared_memory"),
        (seen("a", "b", tp_size=2), True, "broadcast"),
        (seen("a", "b"), False, "broadcast"),
    ],
)
def test_auto_takes_the_nearest_way(survey: Survey, colocated: bool, wanted: str):
    group = Apart()
    ranks = Ranks(group, group if colocated else Apart())
    assert choose("auto", ranks, survey) == wanted
    assert choose("cuda_ipc", ranks, survey) == "cuda_ipc"


@pytest.mark.parametrize("name", ["shared_memory", "cuda_ipc"])
def test_what_needs_one_host_is_refused_on_two(name: str):
    with pytest.raises(ConfigError, match=f"transport is {name} and the ranks are on 2 hosts; use broadcast or auto"):
        TRANSPORTS[name](Ranks(Apart(), Apart()), None, seen("a", "b"), 1)


def test_in_process_is_refused_where_engines_live_elsewhere():
    with pytest.raises(ConfigError, match="transport is in_process: engines and policy live in different processes"):
        TRANSPORTS["in_process"](Ranks(Apart(), Apart()), None, seen("a"), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here cuda_ipc can work")
def test_cuda_ipc_is_refused_without_cuda():
    with pytest.raises(ConfigError, match="transport is cuda_ipc and there is no CUDA device here; use auto"):
        TRANSPORTS["cuda_ipc"](Ranks(Apart(), Apart()), None, seen("a"), 1)


def sync_over(group: SpmdGroup, config: WeightSyncConfig, probe: Probe = PROBE) -> VerifiedSync:
    limits = MicroBatchLimits(1000, None)
    policy = PolicyGroup(group, PassLimits(limits, limits, limits))
    return make_weight_sync(Ranks(group, group), policy, config, torch.float32, probe, print)


def weights_of(host: WorkerHost, _: None) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    engine = host.get(RolloutWorker).engine
    return dict(engine.weight_checksums()), dict(host.get(PolicyWorker).export())


def scale(host: WorkerHost, factor: float) -> None:
    for chunk in host.get(PolicyWorker).chunks:
        for param in chunk.parameters():
            param.data.mul_(factor)


def spoil_engine(host: WorkerHost, name: str) -> None:
    dict(host.get(RolloutWorker).engine._model.named_parameters())[name].data[0] += 1.0


@pytest.mark.parametrize("transport", ["auto", "shared_memory", "in_process", "broadcast"])
def test_a_run_of_one_process_goes_through_every_transport(group: SpmdGroup, transport: str):
    sync = sync_over(group, WeightSyncConfig(transport, bucket_bytes=4096, verify_every=1))
    for version in range(3):
        sync.push(version)
        group.call_all(scale, 1.01)


class Spoiling:
    """A `WeightSync` after whose pushes one tensor of the engine is wrong, from the `since`th on."""

    def __init__(self, inner, group: SpmdGroup, since: int):
        self.inner, self.group, self.since, self.pushes = inner, group, since, 0

    def push(self, version: int) -> None:
        self.inner.push(version)
        if self.pushes >= self.since:
            self.group.call_all(spoil_engine, "model.layers.1.input_layernorm.weight")
        self.pushes += 1


@pytest.mark.parametrize("every, found_at", [(1, 2), (2, 2), (3, 3), (0, None)])
def test_the_first_push_and_every_so_many_are_verified(group: SpmdGroup, every: int, found_at: int | None):
    sync = sync_over(group, WeightSyncConfig("auto", verify_every=every))
    sync.inner = Spoiling(sync.inner, group, since=2)
    for version in range(found_at if found_at is not None else 5):
        sync.push(version)
    if found_at is not None:
        with pytest.raises(WeightSyncError, match=r"in engine 0, checksums: model\.layers\.1\.input_layernorm\.weight"):
            sync.push(found_at)


def test_the_first_push_is_verified_in_any_case(group: SpmdGroup):
    sync = sync_over(group, WeightSyncConfig("auto", verify_every=0))
    sync.inner = Spoiling(sync.inner, group, since=0)
    with pytest.raises(WeightSyncError, match="input_layernorm"):
        sync.push(0)


def test_log_probs_that_differ_stop_the_run_though_the_weights_agree(group: SpmdGroup):
    """The probe asks at one temperature and the trainer computes at another: the weights are right, the numbers not."""
    sync = sync_over(group, WeightSyncConfig("auto"), replace(PROBE, temperature=0.5))
    with pytest.raises(WeightSyncError, match=r"engine 0 and the policy differ by \d.* in a probe's log-probs"):
        sync.push(0)


def test_an_engine_of_another_version_is_told(group: SpmdGroup):
    sync = sync_over(group, WeightSyncConfig("auto"))
    inner = sync.inner

    class Stale:
        def push(self, version: int) -> None:
            inner.push(version - 1)

    sync.inner = Stale()
    with pytest.raises(WeightSyncError, match="engine 0 says that it writes with weights of version 0; 1 was pushed"):
        sync.push(1)


def test_sums_of_both_sides_are_those_of_the_exported_tensors(group: SpmdGroup):
    sync_over(group, WeightSyncConfig("shared_memory")).push(0)
    ((sums, exported),) = group.call_all(weights_of)
    assert sums == {name: checksum(tensor) for name, tensor in exported.items()}
    assert np.unique(list(sums.values())).size == len(sums)


class DyingEngine:
    """Dies once, when it is asked for what is named."""

    def __init__(self, inner: RolloutEngine, at: str):
        self._inner, self._at = inner, at

    def __getattr__(self, name: str):
        if name == self._at:
            self._at = ""
            raise EngineDiedError("killed")
        return getattr(self._inner, name)


@pytest.mark.parametrize("at", ["weight_checksums", "poll", "load_weights"])
def test_an_engine_that_dies_while_it_is_verified_is_started_again_and_verified(
    group: SpmdGroup, at: str, capsys: pytest.CaptureFixture[str]
):
    group.call_all(put_dying_engine, at)
    sync_over(group, WeightSyncConfig("auto")).push(3)
    ((sums, exported),) = group.call_all(weights_of)
    assert sums == {name: checksum(tensor) for name, tensor in exported.items()}
    assert "engine 0: killed" in capsys.readouterr().out


def put_dying_engine(host: WorkerHost, at: str) -> None:
    worker = host.get(RolloutWorker)
    worker.engine = DyingEngine(worker.engine, at)  # type: ignore[assignment]
