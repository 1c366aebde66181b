"""Run as a program: for every case of CASES (JSON), what real ranks hold and keep, and what the planner says of each.

Writes {case name: {"real": [rank], "planned": [rank]}} to OUT. The ranks are forks of this process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.families import shape_of
from megatron_dapo.mcore.footprint import footprint
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.optimizer import apply_update, zero_gradients
from megatron_dapo.mcore.schedule import forward_backward
from megatron_dapo.plan.activations import MicroBatchSize, saved_peak
from megatron_dapo.types import MicroBatch, SequenceBatch, TokenTerms
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker
from tests.functional.forked_ranks import run_ranks
from tests.functional.megatron_groups import forget_layout
from tests.functional.saved_memory import SavedMemory

LENGTHS, PROMPTS = (102, 54), (11, 7)  # tokens of a micro-batch's sequences; their last tokens are not computed


def main(cases_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(cases_file).read_text())
    found = {case["name"]: {"real": [None] * case["world"], "planned": planned(case)} for case in cases}
    for world in sorted({case["world"] for case in cases}):
        mine = [case for case in cases if case["world"] == world]
        run_ranks(world, serve, mine, out_file)
        for rank in range(world):
            part = Path(f"{out_file}.{rank}")
            for name, real in json.loads(part.read_text()).items():
                found[name]["real"][rank] = real
            part.unlink()
    Path(out_file).write_text(json.dumps(found, indent=1))


def planned(case: dict[str, Any]) -> list[dict[str, float]]:
    config, world = MegatronConfig(**case["megatron"]), case["world"]
    shape = shape_of(AutoConfig.from_pretrained(case["model"]))
    cp, stages = config.context_parallel_size, config.pipeline_model_parallel_size
    unit = 2 * cp if cp > 1 else 1  # a sequence is padded until context parallelism can cut it
    computed = sum(-(-(length - 1) // unit) * unit for length in LENGTHS)
    size = MicroBatchSize(computed // cp, (sum(LENGTHS) - sum(PROMPTS)) // cp, len(LENGTHS))
    result = []
    for rank in range(world):
        held = footprint(shape, config, world, rank)
        stage = rank // (world // stages)
        result.append(
            {
                "parameters": held.parameters,
                "gradients": held.gradients,
                "optimizer": held.master + held.moments,
                "saved": saved_peak(shape, config, "torch", size, stage, case["micro_batches"]),
            }
        )
    return result


def serve(cases: list[dict[str, Any]], out_file: str) -> None:
    found = {}
    for case in cases:
        found[case["name"]] = real(case)
        forget_layout()
    Path(f"{out_file}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def real(case: dict[str, Any]) -> dict[str, int]:
    """After one update of equal micro-batches."""
    worker = PolicyWorker(_settings(case))
    weights = [param.data for module in worker.modules for param in module.parameters()]
    zero_gradients(worker.modules, worker.optimizer)
    micro_batches = [_micro_batch(number, worker.shape.vocab_size) for number in range(case["micro_batches"])]
    with SavedMemory(weights) as memory:
        result = forward_backward(worker.model, micro_batches)
    assert memory.now == 0, f"{memory.now} bytes are still kept after the pass"
    assert apply_update(worker.optimizer, 1e-6, result.sums["loss"]).applied
    buffers = [buffer for module in worker.modules for buffer in module.buffers]  # type: ignore[union-attr]  # Megatron's, not torch's
    held = _storages(weights)
    return {
        "parameters": sum(held.values()),
        "gradients": sum(_storages(buffer.grad_data for buffer in buffers).values()),
        "optimizer": _optimizer_bytes(worker, set(held)),
        "saved": memory.peak,
    }


def _optimizer_bytes(worker: PolicyWorker, weights: set[int]) -> int:
    """Master weights that are no views of the model's, and Adam's moments: bytes in use, element by element."""
    total = 0
    for part in worker.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                own = param.data.untyped_storage().data_ptr() not in weights
                total += param.numel() * param.element_size() if own else 0
        for state in part.optimizer.state.values():
            total += sum(value.numel() * value.element_size() for value in state.values() if value.dim())
    return total


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _micro_batch(number: int, vocab: int) -> MicroBatch:
    rng = np.random.default_rng(number)
    lengths, prompts = np.array(LENGTHS), np.array(PROMPTS)
    sequences = SequenceBatch(rng.integers(0, vocab, lengths.sum()).astype(np.int64), lengths, prompts)
    tokens = int((lengths - prompts).sum())
    zero, weight = np.zeros(tokens, np.float32), np.full(len(lengths), 1 / tokens, np.float32)
    return MicroBatch(sequences, TokenTerms(weight, rng.normal(size=len(lengths)).astype(np.float32), zero, None, None))


def _settings(case: dict[str, Any]) -> PolicySettings:
    return PolicySettings(
        model_path=case["model"],
        packed=True,
        megatron=MegatronConfig(**case["megatron"]),
        optim=OptimConfig(),
        grad_clip=1.0,
        objective=Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0),
        seed=1,
        with_reference=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
