"""Run by torchrun, or alone: the runs of JOBS (JSON), one after the other, each with a layout of its own.

A run loads a checkpoint or starts from the model, saves, makes updates, saves again, and makes one more. Rank 0 writes
to its `out` the weights before and after that last one, and its gradient norm. The first save is made for its plan,
which the second one uses: on all ranks, or, with `forgets`, on none, because that rank has lost it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.save_plan import Planning
from megatron_dapo.mcore.weights import load_hf, local_parameters
from megatron_dapo.types import MicroBatch
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker, SaveOrder, UpdateShard, UpdateStats
from tests.functional.megatron_groups import forget_layout
from tests.functional.tiny_models import make_rollouts, token_terms


def main(jobs_file: str) -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(jobs_file).read_text()):
        run(job)
    dist.barrier()
    dist.destroy_process_group()


def run(job: dict[str, Any]) -> None:
    worker = PolicyWorker(settings_of(job))
    for _, param in local_parameters(worker.chunks):
        param.data.fill_(torch.nan)
    load_hf(worker.chunks, worker.shape, job["model"])  # sets every element, those of the vocabulary's padding too
    if "load" in job:
        worker.load(job["load"])
    if "save" in job:
        save(worker, job["save"] + ".first")
    for number in range(job.get("updates", 0)):
        update(worker, number)
    if "save" in job:
        if dist.get_rank() == job.get("forgets"):
            worker._planning = Planning()
        save(worker, job["save"])
    before = dict(worker.export())
    (stats,) = whole_group(update(worker, 100))
    after = dict(worker.export())
    if dist.get_rank() == 0:
        torch.save({"before": before, "after": after, "norm": stats.grad_norm}, job["out"])
    forget_layout()


def save(worker: PolicyWorker, path: str) -> None:
    """What the driver of a run does over its control plane."""
    if dist.get_rank() == 0:
        os.makedirs(path)
    dist.barrier()
    worker.start_save(SaveOrder(path, background=True))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, worker.save_outcome(wait=True))
    assert worker.finish_save([part.results for part in parts] if dist.get_rank() == 0 else None) is None
    dist.barrier()


def settings_of(job: dict[str, Any]) -> PolicySettings:
    return PolicySettings(
        model_path=job["model"],
        packed=True,
        megatron=MegatronConfig(**job["megatron"]),
        optim=OptimConfig(lr=0.1, eps=0.1),  # a large epsilon: the step stays in proportion to the gradient
        grad_clip=0.5,
        objective=Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0),
        seed=1,
        with_reference=False,
    )


def update(worker: PolicyWorker, seed: int) -> list[UpdateStats]:
    """One update on this replica's half or whole of made-up rollouts, the same ones for every layout."""
    rollouts = make_rollouts(count=8, seed=seed)
    batch, layout = rollouts.sequences, worker.layout
    whole = MicroBatch(batch, token_terms(rollouts, rollouts.advantage * 0 + 0.02, rollouts.shift - 4.0, None))
    held = list(range(layout.dp_rank, len(batch), layout.dp_size))
    shares = [held[::2], held[1::2]]
    micro_batches = tuple(MicroBatch(batch.select(s), whole.terms.select(batch.cu_responses, s)) for s in shares)
    return list(worker.update(UpdateShard((micro_batches,), lr=0.1)))


def whole_group(found: list[UpdateStats]) -> list[UpdateStats]:
    """What the first rank that reports has to say, on every rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return next(stats for stats in everywhere if stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
