"""From hidden states to the DAPO loss and its gradient in one pass, over a vocabulary that tensor parallelism splits.

For each chunk of tokens: logits on the local vocabulary shard and their statistics (`fused/blocked.py` on a CPU,
`fused/rows.py` on CUDA); one all-gather of four statistics a token (`fused/softmax.py`); the objective and its slopes
(`fused/objective.py`); the gradient of hidden states and weight, on CUDA through that of the logits in their place.
Three matrix products. Logits live for one chunk and are never kept; only sequence-level ratios compute them twice, for
the ratio of a sequence has to be known before the gradient of its first token.

Axes: `n` tokens, `h` hidden size, `v` rows of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dapo.mcore.batch import HeadTerms
from megatron_dapo.mcore.fused.blocked import BlockedShard, compute_type
from megatron_dapo.mcore.fused.objective import SUMS, Objective, sequence_ratio, token_objective
from megatron_dapo.mcore.fused.softmax import LOGITS_BYTES, Softmax, Vocabulary, VocabularyShard, combine

__all__ = ["LOGITS_BYTES", "SUMS", "HeadResult", "MainGrad", "Objective", "Vocabulary", "dapo_loss", "token_logp"]


@dataclass(frozen=True)
class HeadResult:
    loss: Tensor  # []
    sums: Tensor  # [len(SUMS)] float64, detached
    logp: Tensor  # [n] float32 (float64 where the hidden states are), detached
    entropy: Tensor  # [n] likewise


@dataclass(frozen=True)
class MainGrad:
    """Where Megatron's DDP sums a weight's gradients over micro-batches, in float32."""

    buffer: Tensor  # [v,h]
    shared: bool  # this rank's embedding has the same weight: its gradient comes through autograd


def dapo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    terms: HeadTerms,
    objective: Objective,
    vocabulary: Vocabulary,
    context: dist.ProcessGroup | None = None,
    main_grad: MainGrad | None = None,
) -> HeadResult:
    """hidden [n,h], weight [v,h], targets [n] -> the weighted sum of the loss, differentiable in hidden and weight.

    The gradient with respect to `hidden` is this rank's share of the vocabulary: the caller sums it over tensor
    parallelism (all-reduce, or reduce-scatter under sequence parallelism). `context`: the context-parallel ranks,
    between which sequences may be cut; sequence-level ratios are summed over them.

    With `main_grad` the weight's gradient is added there, in the forward pass, and autograd is told of zeros that take
    no memory. What comes from above must then be 1, as in Megatron's schedule: no loss scale (float32 and bfloat16
    have none) and no division (`calculate_per_token_loss`). Under `torch.no_grad()` there is no gradient anywhere.

    Raises:
        ValueError: the objective has a `tis_cap` and the terms have no rollout log-probs.
        RuntimeError: in backward, with `main_grad`: what comes from above is not 1.
    """
    job = _Job(targets, terms, objective, vocabulary, context, main_grad, torch.is_grad_enabled())
    return HeadResult(*_OnePass.apply(hidden, weight, job))  # type: ignore[misc]


def token_logp(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, [n] each, float32; no gradient, no logits kept."""
    found = hidden.new_empty(2, len(hidden), dtype=compute_type(hidden.dtype))
    with torch.no_grad():
        for part, softmax, _ in _softmaxes(hidden, weight, targets, temperature, vocabulary, keep=False):
            found[0, part], found[1, part] = softmax.logp, softmax.entropy
    return found[0], found[1]


def _softmaxes(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, vocabulary: Vocabulary, keep: bool
) -> Iterator[tuple[slice, Softmax, VocabularyShard]]:
    """Chunk by chunk; `keep`: a gradient will be asked for."""
    parts = vocabulary.chunks(len(hidden), weight.size(0), compute_type(hidden.dtype).itemsize)
    if not parts:
        return
    shard = _shard(weight, vocabulary, temperature, parts[0].stop, keep)
    for part in parts:
        statistics = shard.statistics(hidden[part], targets[part])
        yield part, combine(statistics, vocabulary.group), shard


def _shard(weight: Tensor, vocabulary: Vocabulary, temperature: float, tokens: int, keep: bool) -> VocabularyShard:
    if weight.is_cuda:
        from megatron_dapo.mcore.fused.rows import RowShard  # Triton, which a CPU has not

        return RowShard(weight, vocabulary, temperature, tokens)
    return BlockedShard(weight, vocabulary, temperature, tokens, keep)


@dataclass(frozen=True)
class _Job:
    """What `dapo_loss` takes besides hidden states and weight."""

    targets: Tensor
    terms: HeadTerms
    objective: Objective
    vocabulary: Vocabulary
    context: dist.ProcessGroup | None
    main_grad: MainGrad | None
    with_gradient: bool


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> tuple[Tensor, ...]:
        objective, vocabulary = job.objective, job.vocabulary
        logp = hidden.new_empty(len(hidden), dtype=compute_type(hidden.dtype))
        entropy = torch.empty_like(logp)
        sums = hidden.new_zeros(len(SUMS), dtype=torch.float64)
        gradients = _gradient_buffers(hidden, weight, job.main_grad) if job.with_gradient else None
        sequences = None
        if objective.ratio == "sequence":
            present, _ = token_logp(hidden, weight, job.targets, objective.temperature, vocabulary)
            sequences = sequence_ratio(present, job.terms, objective, job.context)
        for part, softmax, shard in _softmaxes(
            hidden, weight, job.targets, objective.temperature, vocabulary, keep=job.with_gradient
        ):
            logp[part], entropy[part] = softmax.logp, softmax.entropy
            terms = _at(job.terms, part)
            slopes, added = token_objective(softmax.logp, softmax.entropy, terms, objective, sequences)
            sums += added
            if gradients is not None:
                d_hidden, d_weight = gradients
                shard.backward(softmax, slopes, d_hidden[part], d_weight)
        if gradients is not None:
            d_hidden, d_weight = gradients
            ctx.save_for_backward(d_hidden, weight if job.main_grad else d_weight.to(weight.dtype))
        ctx.main_grad = job.main_grad
        ctx.mark_non_differentiable(sums, logp, entropy)
        return sums[SUMS.index("loss")].to(logp.dtype), sums, logp, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.main_grad is None:
            d_hidden, d_weight = ctx.saved_tensors
            return d_hidden * d_loss, d_weight * d_loss, None
        d_hidden, weight = ctx.saved_tensors
        unscaled = "the weight's gradient is in main_grad already, so the loss cannot be scaled after that; let it be"
        torch._assert_async(d_loss == 1, unscaled)  # type: ignore[attr-defined]  # waits for no device
        return d_hidden, None if ctx.main_grad.shared else _no_gradient(weight), None


def _gradient_buffers(hidden: Tensor, weight: Tensor, main_grad: MainGrad | None) -> tuple[Tensor, Tensor]:
    if main_grad is not None:
        return torch.empty_like(hidden), main_grad.buffer
    return torch.empty_like(hidden), torch.zeros_like(weight, dtype=compute_type(weight.dtype))


def _no_gradient(weight: Tensor) -> Tensor:
    """Zeros of the weight's shape without memory: a sparse tensor with no entry.

    With `overlap_grad_reduce` Megatron's hook on the weight wants to see a gradient, on the thread of its device.
    """
    nowhere = torch.empty(weight.dim(), 0, dtype=torch.int64, device=weight.device)
    return torch.sparse_coo_tensor(nowhere, weight.new_empty(0), weight.shape, check_invariants=False)


def _at(terms: HeadTerms, part: slice) -> HeadTerms:
    """The terms of a chunk."""

    def where_given(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[part]

    return HeadTerms(
        weight=terms.weight[part],
        advantage=terms.advantage[part],
        old_logp=where_given(terms.old_logp),
        ref_logp=where_given(terms.ref_logp),
        rollout_logp=where_given(terms.rollout_logp),
        sequence=terms.sequence[part],
        num_sequences=terms.num_sequences,
    )
