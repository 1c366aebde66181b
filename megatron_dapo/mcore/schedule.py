"""Micro-batches through Megatron's own pipeline schedule: forward and backward, or log-probs alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_dapo.mcore.batch import RankBatch, rank_batch
from megatron_dapo.mcore.fused_loss import SUMS, Objective
from megatron_dapo.mcore.head import DapoHead
from megatron_dapo.mcore.parallel import RankLayout, current_layout
from megatron_dapo.progress import PROGRESS
from megatron_dapo.types import FloatArray, MicroBatch, PlannedMicroBatch, SequenceBatch


@dataclass(frozen=True)
class TokenStats:
    """Log-prob and entropy of each response token of a micro-batch, [N] each."""

    logp: FloatArray
    entropy: FloatArray


@dataclass(frozen=True)
class PassResult:
    """What one pass found. `tokens` holds one entry a micro-batch on the last pipeline stage, none on the others."""

    sums: dict[str, float]  # SUMS, over this replica's micro-batches; zeros but on the last stage
    tokens: list[TokenStats]


@dataclass(frozen=True)
class Model:
    """The chunks of this rank (wrapped for data parallelism while training) and how to feed them."""

    chunks: Sequence[torch.nn.Module]
    objective: Objective
    packed: bool
    config: Any  # Megatron's TransformerConfig


def forward_backward(model: Model, micro_batches: Sequence[MicroBatch | PlannedMicroBatch]) -> PassResult:
    """One forward and backward pass of each micro-batch; gradients are summed over all ranks by Megatron."""
    return _run(model, micro_batches, forward_only=False)


def log_probs(model: Model, micro_batches: Sequence[SequenceBatch]) -> PassResult:
    """Log-probs and entropies under the model's present weights."""
    with torch.no_grad():
        return _run(model, micro_batches, forward_only=True)


def _run(
    model: Model, micro_batches: Sequence[MicroBatch | PlannedMicroBatch | SequenceBatch], forward_only: bool
) -> PassResult:
    layout = current_layout()
    batches = [rank_batch(mb, layout, model.packed, model.config.sequence_parallel) for mb in micro_batches]
    outputs: list[dict[str, Any]] = get_forward_backward_func()(
        forward_step_func=_forward_step(model.objective, len(batches) * len(model.chunks)),
        data_iterator=[iter(batches) for _ in model.chunks] if len(model.chunks) > 1 else iter(batches),
        model=list(model.chunks),
        num_microbatches=len(batches),
        seq_length=max(batch.model.token_ids.size(1) for batch in batches) * layout.cp_size,
        micro_batch_size=max(batch.model.token_ids.size(0) for batch in batches),
        forward_only=forward_only,
    )
    PROGRESS.step("the end of a pass")
    if not outputs:
        return PassResult(dict.fromkeys(SUMS, 0.0), [])
    sums = _over_context(torch.stack([output["sums"] for output in outputs]).sum(0), layout)
    tokens = [_token_stats(batch, output, layout) for batch, output in zip(batches, outputs, strict=True)]
    return PassResult(dict(zip(SUMS, sums.tolist(), strict=True)), tokens)


def _forward_step(objective: Objective, count: int) -> Any:
    numbers = itertools.count(1)  # with several chunks, a micro-batch's pass through each counts

    def step(iterator: Iterator[RankBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        PROGRESS.step(f"micro-batch {next(numbers)} of {count}")
        batch = next(iterator)
        last = get_attr_wrapped_model(model, "post_process")
        head = cast(DapoHead, get_attr_wrapped_model(model, "output_layer")) if last else None
        if head is not None:
            head.inputs, head.objective = batch.head, objective
        output = model(batch.model.token_ids, batch.model.position_ids, None, packed_seq_params=batch.model.packed)
        if head is None:
            return output, None
        result = head.result
        found = {"sums": result.sums, "logp": result.logp, "entropy": result.entropy}

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            PROGRESS.step(PROGRESS.label)
            # 0 tokens: `finalize_model_grads` then divides by nothing, for the weights hold the denominators.
            return output.sum(), torch.zeros((), dtype=torch.int, device=output.device), found

        return output, loss

    return step


def _token_stats(batch: RankBatch, output: dict[str, Any], layout: RankLayout) -> TokenStats:
    """Put this rank's positions where they belong among the micro-batch's response tokens."""
    both = torch.zeros(2, batch.head.num_tokens, device=output["logp"].device)
    both[0, batch.head.source], both[1, batch.head.source] = output["logp"], output["entropy"]
    logp, entropy = _over_context(both, layout).cpu().numpy().astype(np.float32)
    return TokenStats(logp, entropy)


def _over_context(values: torch.Tensor, layout: RankLayout) -> torch.Tensor:
    if layout.cp_size > 1:
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return values
