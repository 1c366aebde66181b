"""The ranks of the layout tests: every case that comes is run on the real Megatron path and held against its answer.

Run as a program with the file descriptor of a connection, over which the sizes of worlds come. The ranks of a world are
forks of this process, which has imported Megatron once for all of them. Rank 0 reads cases from the same connection.

Deviations are relative: of the loss to the sum of its terms' sizes, of a gradient to the largest entry of that
parameter's gradient, of a step to the largest change of any weight; those of log-probs and entropies are absolute.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import OptimConfig
from megatron_dapo.data.minibatch import LossWeighting, MiniBatch, build_update
from megatron_dapo.data.packing import Plan, plan_micro_batches
from megatron_dapo.mcore.families.names import Shard, pieces
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.optimizer import zero_gradients
from megatron_dapo.mcore.schedule import PassResult, forward_backward
from megatron_dapo.mcore.weights import local_parameters
from megatron_dapo.types import FloatArray, IntArray, MicroBatch, PlannedMicroBatch, SequenceBatch
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker, UpdateShard
from tests.functional.forked_ranks import run_ranks
from tests.functional.layout_cases import CLIP, LR, Deviations, Job
from tests.functional.layout_faults import DATA_FAULTS, planted
from tests.functional.megatron_groups import forget_layout

# Adam without momentum and with a huge epsilon is plain gradient descent: its step is rate · g / (|g| + epsilon),
# which is (rate / epsilon) · g but for |g| / epsilon, under every optimizer that Megatron has.
EPSILON = 1e6
PATIENCE = 120  # seconds until a rank that hangs says where and ends
_ONE_MICRO_BATCH = 10**6  # tokens


def main(descriptor: str) -> None:
    torch.set_num_threads(1)
    connection = Connection(int(descriptor))
    while (world := pickle.loads(connection.recv_bytes())) is not None:
        try:
            run_ranks(world, serve, connection)
        except ProcessException as error:
            connection.send(str(error))


def serve(connection: Connection) -> None:
    """On each rank: deviations of one job after the other, the largest over all ranks, until None comes."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    dist.init_process_group("gloo")
    faulthandler.cancel_dump_traceback_later()
    while True:
        box: list[Job | None] = [pickle.loads(connection.recv_bytes()) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        if (job := box[0]) is None:
            break
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        with planted(job.case.fault):
            found = run(job)
        faulthandler.cancel_dump_traceback_later()
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        forget_layout()
        if dist.get_rank() == 0:
            connection.send({key: _worst(d[key] for d in everywhere if key in d) for d in everywhere for key in d})
    dist.destroy_process_group()


def _worst(values: Iterator[float]) -> float:
    return float(np.max(list(values)))  # NaN stays NaN


def run(job: Job) -> Deviations:
    wanted = job.answer
    worker = PolicyWorker(_settings(job))
    plan = _plan(job, worker.layout.dp_size)
    micro_batches = _micro_batches(job, plan, worker.layout.dp_rank)
    own = plan[worker.layout.dp_rank]
    reports = worker.layout.reports

    zero_gradients(worker.modules, worker.optimizer)
    result = forward_backward(worker.model, micro_batches)
    gap = abs(_over_replicas(result, reports) - wanted.loss) / wanted.loss_size
    found = {"loss": gap} | (_token_deviations(job, own, result) if reports else {})
    found |= _gradient_deviations(worker, wanted.grads)

    stats = list(worker.update(UpdateShard((micro_batches,) * job.case.steps, LR * EPSILON)))
    if reports:
        found["gradient norm"] = abs(stats[0].grad_norm - wanted.grad_norm) / wanted.grad_norm
    found |= _step_deviation(worker, job)
    after = worker.log_probs(tuple(mb.sequences for mb in micro_batches))
    if reports:
        logp, sequences = [stats.logp for stats in after], job.problem.sequences
        if job.case.bf16:
            found["mean logp after the step"] = _gap(logp, wanted.logp_stepped, sequences, own, np.mean)
        else:
            found["logp after the step"] = _gap(logp, wanted.logp_stepped, sequences, own)
    return found


def _settings(job: Job) -> PolicySettings:
    formula = job.formula
    return PolicySettings(
        model_path=job.model_path,
        packed=job.case.packed,
        megatron=job.case.megatron(),
        optim=OptimConfig(lr=LR * EPSILON, betas=(0.0, 0.0), eps=EPSILON, weight_decay=0.0),
        grad_clip=CLIP,
        objective=Objective(
            PolicyLossConfig(formula.clip_low, formula.clip_high, formula.dual_clip),
            temperature=formula.temperature,
            entropy_coeff=formula.entropy_coeff,
            kl_coef=formula.kl_coef,
        ),
        seed=1,
        with_reference=False,
    )


def _plan(job: Job, dp_size: int) -> Plan:
    many = job.case.micro_batches == "many"
    return plan_micro_batches(
        job.problem.sequences.lengths,
        dp_size,
        max_tokens=None if many else _ONE_MICRO_BATCH,
        max_sequences=job.sequences_per_micro_batch if many else None,
        multiple_of=job.case.pp if job.case.virtual else 1,
    )


def _micro_batches(job: Job, plan: Plan, dp_rank: int) -> tuple[MicroBatch | PlannedMicroBatch, ...]:
    problem, formula = job.problem, job.formula
    batch = MiniBatch.from_groups(problem.groups, problem.advantages, problem.old_logp, problem.ref_logp)
    weighting = LossWeighting(formula.agg_mode, formula.scale, formula.overlong_filtering)
    own = build_update(batch, plan, weighting).ranks[dp_rank]
    fault = DATA_FAULTS.get(job.case.fault)
    return own if fault is None else tuple(map(fault, own))


def _over_replicas(result: PassResult, reports: bool) -> float:
    loss = torch.tensor(result.sums["loss"] if reports else 0.0, dtype=torch.float64)
    dist.all_reduce(loss)
    return loss.item()


def _token_deviations(job: Job, own: tuple[tuple[int, ...], ...], result: PassResult) -> Deviations:
    batch = job.problem.sequences
    logp, entropy = [t.logp for t in result.tokens], [t.entropy for t in result.tokens]
    return {
        "logp": _gap(logp, job.answer.logp, batch, own),
        "mean logp": _gap(logp, job.answer.logp, batch, own, np.mean),
        "entropy": _gap(entropy, job.answer.entropy, batch, own),
    }


def _gap(
    found: list[FloatArray],
    wanted_N: FloatArray,
    batch: SequenceBatch,
    own: tuple[tuple[int, ...], ...],
    over: Callable[[FloatArray], Any] = np.max,
) -> float:
    """The largest gap, or another number, over this replica's tokens; what a filler micro-batch says is left out."""
    gaps = [
        np.abs(values - wanted_N[_rows(batch.cu_responses, indices)])
        for values, indices in zip(found, own, strict=True)
        if indices
    ]
    return float(over(np.concatenate(gaps))) if gaps else 0.0


def _rows(offsets: IntArray, indices: tuple[int, ...]) -> IntArray:
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices])


def _gradient_deviations(worker: PolicyWorker, wanted: dict[str, torch.Tensor]) -> Deviations:
    _complete_gradients(worker)
    layout = worker.layout
    largest = max(grad.abs().max().item() for grad in wanted.values())
    worst = {"gradient": 0.0, "gradient distance": 0.0, "gradient among all": 0.0}
    for name, param in local_parameters(worker.chunks):
        expected = torch.zeros_like(param.main_grad)
        for piece in pieces(name, Shard(worker.shape, layout.tp_rank, layout.tp_size)):
            expected[piece.local_index(param.dim())] = wanted[piece.hf_name][piece.hf_index(param.dim())]
        whole = torch.cat([wanted[p.hf_name].flatten() for p in pieces(name, Shard(worker.shape, 0, 1))])
        gap = param.main_grad - expected
        ratios = {
            "gradient": gap.abs().max() / whole.abs().max(),
            "gradient distance": gap.norm() / whole.norm(),
            "gradient among all": gap.abs().max() / largest,
        }
        worst = {what: float(np.maximum(value, ratios[what].item())) for what, value in worst.items()}
    return worst


def _complete_gradients(worker: PolicyWorker) -> None:
    """Under the distributed optimizer a rank holds the sums of its slice of each bucket alone: gather the others."""
    if not worker.settings.megatron.use_distributed_optimizer:
        return
    for module in worker.modules:
        for buffer in cast(list[Any], module.buffers):  # Megatron's, in the place of torch's method
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _step_deviation(worker: PolicyWorker, job: Job) -> Deviations:
    wanted = job.answer
    largest = max((wanted.stepped[n] - weight).abs().max().item() for n, weight in wanted.weights.items())
    gaps = []
    for name, tensor in worker.export():
        gap = (tensor.float() - wanted.stepped[name]).abs()
        if job.case.bf16:  # beyond what the exported weights' own rounding explains
            gap = (gap - wanted.stepped[name].abs() * 2**-8).clamp(min=0)
        gaps.append(gap.max().item())
    return {"step": _worst(iter(gaps)) / largest}


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
