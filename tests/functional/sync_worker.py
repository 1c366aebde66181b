"""Run under torchrun: every case of CASES (JSON), weights from real Megatron ranks into a real engine on each.

Writes, on rank 0, {case name: what was found} to OUT. Every rank drives: a call runs the rank's own part and gathers
the answers, so that one start of torchrun does for all cases.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig, OptimConfig, WeightSyncConfig
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.rollout.no_engine import NoEngine
from megatron_dapo.rollout.torch_engine import TorchEngine
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.embedded import EmbeddedSync
from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.staged import SyncWorker
from megatron_dapo.sync.stores import NAMES
from megatron_dapo.sync.survey import Ranks
from megatron_dapo.sync.transport import Transport
from megatron_dapo.sync.transports import make_weight_sync
from megatron_dapo.sync.verify import Probe
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker
from megatron_dapo.workers.policy_group import MicroBatchLimits, PassLimits, PolicyGroup
from megatron_dapo.workers.rollout import RolloutWorker
from tests.functional.megatron_groups import forget_layout


@dataclass(frozen=True)
class Done:
    """The handle of a call that has ended; nothing here streams."""

    values: list[Any]  # [rank]

    def result(self) -> list[Any]:
        return self.values


class EveryRankDrives:
    """A `WorkerGroup` for a script that all ranks run alike."""

    def __init__(self, host: WorkerHost):
        self.host, self.size = host, dist.get_world_size()

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> Done:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, self.host.run(method, shards[dist.get_rank()]))
        return Done(found)

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        return self.start(method, shards).result()

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        return self.call(method, [argument] * self.size)


class Faulty:
    """A transport that does one thing wrong to what arrives at this rank's engine."""

    def __init__(self, inner: Transport, fault: str):
        self.inner, self.fault = inner, fault

    def exchange(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self.inner.exchange()
        held = None
        for name, tensor in tensors:
            if self.fault == "drop" and "layers.1.mlp.up_proj" in name:
                continue
            if self.fault == "corrupt" and "layers.1.mlp.up_proj" in name:
                tensor = tensor.clone()
                tensor[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(torch.inf))
            if self.fault == "swap" and "layers.1.mlp.gate_proj" in name:
                held = tensor.clone()
                continue
            if self.fault == "swap" and "layers.1.mlp.up_proj" in name:
                assert held is not None
                yield name.replace("up_proj", "gate_proj"), tensor
                tensor = held
            yield name, tensor

    def abandon(self) -> None:
        self.inner.abandon()


def main(cases_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for case in json.loads(Path(cases_file).read_text()):
        found[case["name"]] = run_case(case)
        forget_layout()
    if dist.get_rank() == 0:
        Path(out_file).write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    worker = PolicyWorker(_settings(case))
    host = WorkerHost()
    host.add(worker)
    every = case.get("engine_every", 1)
    engine = None if dist.get_rank() % every else _engine(case["model"])
    host.add(RolloutWorker(engine or NoEngine()))
    group = EveryRankDrives(host)
    stages = worker.layout.pp_size if worker.settings.megatron.virtual_pipeline_model_parallel_size else 1
    limits = MicroBatchLimits(1000, None, multiple_of=stages)
    policy = PolicyGroup(group, PassLimits(limits, limits, limits))
    config = WeightSyncConfig(case["transport"], case["bucket_bytes"], verify_every=1)
    probe = Probe(worker.shape.vocab_size, 8, 8, case.get("temperature", 1.0), 1e-4)
    sync = make_weight_sync(Ranks(group, group, every), policy, config, torch.float32, probe, print)
    if (fault := case.get("fault")) and dist.get_rank() == case["at_rank"]:
        through = host.get(SyncWorker)
        through.transport = Faulty(through.transport, fault)
    left = glob(f"{NAMES}{os.getpid()}_*")
    found: dict[str, Any] = {"in_process": isinstance(sync.inner.inner, EmbeddedSync), "error": ""}
    gaps = []
    try:
        for version in (0, 1, 2):
            sync.push(version)
            gaps.append(_different(worker, engine))
            _change_weights(worker)
    except WeightSyncError as error:
        found["error"] = str(error)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (gaps, left))
    return found | {"different": [gaps for gaps, _ in everywhere], "names left": [left for _, left in everywhere]}


def _settings(case: dict[str, Any]) -> PolicySettings:
    return PolicySettings(
        model_path=case["model"],
        packed=True,
        megatron=MegatronConfig(**case["megatron"]),
        optim=OptimConfig(),
        grad_clip=1.0,
        objective=Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=case.get("temperature", 1.0)),
        seed=1,
        with_reference=False,
    )


def _engine(model: str) -> TorchEngine:
    return TorchEngine(model, [1], max_num_seqs=4, device="cpu", dtype=torch.float32)


def _different(worker: PolicyWorker, engine: TorchEngine | None) -> list[str]:
    """Tensors of the engine that are not bit for bit those of the gathering export, which is collective."""
    exported = dict(worker.export())
    if engine is None:
        return []
    held = dict(engine._model.named_parameters())  # what the engine computes with
    assert set(held) == set(exported)
    return [name for name, tensor in exported.items() if not torch.equal(held[name], tensor)]


def _change_weights(worker: PolicyWorker) -> None:
    """Each element by a factor of its own value: the same on all ranks that hold it."""
    for chunk in worker.chunks:
        for param in chunk.parameters():
            param.data.mul_(1.0 + 0.01 * torch.sin(100.0 * param.data))


if __name__ == "__main__":
    main(*sys.argv[1:])
