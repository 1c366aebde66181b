"""Run under torchrun: every case of CASES (JSON) on the real Megatron path, held against the oracle's answers.

Writes, on rank 0, {case name: {what: largest deviation over all ranks}} to OUT. Deviations are relative: of a gradient
to the largest entry of that parameter's gradient, of a step to the largest change of any weight.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))


from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore import optimizer as mcore_optimizer
from megatron_dapo.mcore.families.names import Shard, pieces
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.optimizer import apply_update, zero_gradients
from megatron_dapo.mcore.schedule import PassResult, forward_backward, log_probs
from megatron_dapo.mcore.weights import local_parameters
from megatron_dapo.types import MicroBatch, SequenceBatch, TokenTerms
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker, UpdateShard

# isort: split
# Megatron needs the CPU device that importing megatron_dapo.mcore installs.
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads as finalize

STEP = {"lr": 1.0, "eps": 1.0, "clip": 0.5}  # Adam with a large epsilon: the step stays in proportion to the gradient


def main(cases_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for case in json.loads(Path(cases_file).read_text()):
        with planted(case.get("fault")):
            deviations = run_case(case)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, deviations)
        found[case["name"]] = {key: max(d.get(key, 0.0) for d in everywhere) for d in everywhere for key in d}
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(out_file).write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def run_case(case: dict[str, Any]) -> dict[str, float]:
    data = torch.load(case["data"], weights_only=False)
    worker = PolicyWorker(_settings(case))
    layout = worker.layout
    plan = _plan(len(data["sequences"]), layout.dp_size, case.get("micro_batches", 1))[layout.dp_rank]
    terms: TokenTerms = data["terms"]
    micro_batches = [_micro_batch(data["sequences"], terms, indices, case) for indices in plan]

    alone = log_probs(worker.model, [mb.sequences for mb in micro_batches])
    zero_gradients(worker.modules, worker.optimizer)
    result = forward_backward(worker.model, micro_batches)
    loss = _summed_loss(result, layout.reports)
    deviations = {"loss": abs(loss - data["loss"]) / abs(data["loss"])}
    if layout.reports:
        deviations |= _token_deviations(data, plan, result, alone)
    if not worker.settings.megatron.use_distributed_optimizer:
        deviations |= _gradient_deviations(worker, data["grads"])
    outcome = apply_update(worker.optimizer, STEP["lr"], result.sums["loss"])
    deviations["gradient norm"] = abs(outcome.grad_norm - data["grad_norm"]) / data["grad_norm"]
    list(worker.update(UpdateShard((tuple(micro_batches),), STEP["lr"])))
    return deviations | _step_deviation(worker, data)


def _settings(case: dict[str, Any]) -> PolicySettings:
    given = case.get("megatron", {})
    names = {field.name for field in fields(MegatronConfig)}
    assert set(given) <= names, set(given) - names
    objective = case.get("objective", {})
    return PolicySettings(
        model_path=case["model"],
        packed=case.get("packed", True),
        megatron=MegatronConfig(**{"use_distributed_optimizer": False, **given}),
        optim=OptimConfig(lr=STEP["lr"], eps=STEP["eps"], weight_decay=0.01),
        grad_clip=STEP["clip"],
        objective=Objective(
            PolicyLossConfig(0.2, 0.28, 10.0),
            temperature=objective.get("temperature", 1.0),
            entropy_coeff=objective.get("entropy_coeff", 0.0),
            kl_coef=objective.get("kl_coef", 0.0),
        ),
        seed=1,
        with_reference=False,
    )


def _plan(count: int, dp_size: int, micro_batches: int) -> list[list[list[int]]]:
    """Uneven on purpose: the first data-parallel rank gets the first sequences, the last what is left."""
    parts = [list(map(int, part)) for part in np.array_split(np.arange(count), dp_size * micro_batches)]
    return [parts[rank * micro_batches : (rank + 1) * micro_batches] for rank in range(dp_size)]


def _micro_batch(sequences: SequenceBatch, terms: TokenTerms, indices: list[int], case: dict[str, Any]) -> MicroBatch:
    chosen = terms.select(sequences.cu_responses, indices)
    if case.get("fault") == "weights off by one token":
        chosen = replace(chosen, weight=np.roll(chosen.weight, 1))
    return MicroBatch(sequences.select(indices), chosen)


def _summed_loss(result: PassResult, reports: bool) -> float:
    loss = torch.tensor(result.sums["loss"] if reports else 0.0, dtype=torch.float64)
    dist.all_reduce(loss)
    return loss.item()


def _token_deviations(
    data: dict[str, Any], plan: list[list[int]], result: PassResult, alone: PassResult
) -> dict[str, float]:
    offsets, worst = data["sequences"].cu_responses, {"logp": 0.0, "entropy": 0.0, "logp alone": 0.0}
    for indices, training, frozen in zip(plan, result.tokens, alone.tokens, strict=True):
        rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices])
        pairs = {
            "logp": (training.logp, "logp"),
            "entropy": (training.entropy, "entropy"),
            "logp alone": (frozen.logp, "logp"),
        }
        for what, (values, key) in pairs.items():
            worst[what] = max(worst[what], float(np.abs(values - data[key][rows]).max()))
    return worst


def _gradient_deviations(worker: PolicyWorker, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    worst = {"gradient": 0.0}
    layout = worker.layout
    for name, param in local_parameters(worker.chunks):
        expected = torch.zeros_like(param.main_grad)
        for piece in pieces(name, Shard(worker.shape, layout.tp_rank, layout.tp_size)):
            expected[piece.local_index(param.dim())] = wanted[piece.hf_name][piece.hf_index(param.dim())]
        largest = max(wanted[piece.hf_name].abs().max().item() for piece in pieces(name, Shard(worker.shape, 0, 1)))
        gap = (param.main_grad - expected).abs().max().item() / largest
        worst["gradient"] = max(worst["gradient"], gap)
    return worst


def _step_deviation(worker: PolicyWorker, data: dict[str, Any]) -> dict[str, float]:
    largest = max((data["stepped"][n] - data["weights"][n]).abs().max().item() for n in data["weights"])
    gaps = [(tensor - data["stepped"][name]).abs().max().item() for name, tensor in worker.export()]
    return {"step": max(gaps) / largest}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """A mistake of the kind that the matrix exists to catch."""
    if fault in (None, "weights off by one token"):
        yield
        return
    plain = mcore_optimizer.finalize_model_grads
    faulty = {
        "missing sequence-parallel reduction": _finalize_without("_allreduce_non_tensor_model_parallel_grads"),
        "unsynchronised tied embedding": _finalize_without("_allreduce_word_embedding_grads"),
        "extra division by context-parallel size": _finalize_divided,
    }[fault]
    mcore_optimizer.finalize_model_grads = faulty
    try:
        yield
    finally:
        mcore_optimizer.finalize_model_grads = plain


def _finalize_without(part: str) -> Any:
    def finalize_model_grads(*args: Any, **kwargs: Any) -> None:
        namespace = finalize.__globals__
        kept = namespace[part]
        namespace[part] = lambda *a, **k: None
        try:
            finalize(*args, **kwargs)
        finally:
            namespace[part] = kept

    return finalize_model_grads


def _finalize_divided(model: Any, *args: Any, **kwargs: Any) -> None:
    finalize(model, *args, **kwargs)
    for chunk in model:
        chunk.scale_gradients(1.0 / parallel_state.get_context_parallel_world_size())


if __name__ == "__main__":
    main(*sys.argv[1:])
