"""Triton kernels over the logits of a chunk: statistics in one read, then the gradient in place.

A program does a row of the logits [c,v], block of columns after block of columns. Needs CUDA, or `TRITON_INTERPRET=1`.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_dapo.mcore.fused.softmax import PADDING

_PADDING = tl.constexpr(PADDING)
_BLOCK = 4096
_WARPS = 8


def row_statistics(logits: Tensor, targets: Tensor, out: Tensor, real: int, inverse_temperature: float) -> None:
    """logits [c,v] float32, targets [c] as columns (others' are outside) -> out [4,c], see `VocabularyShard`.

    Columns from `real` on are padding.
    """
    tokens, columns = logits.shape
    _statistics[(tokens,)](
        logits,
        targets,
        out,
        logits.stride(0),
        columns,
        real,
        tokens,
        inverse_temperature,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def row_gradient(
    logits: Tensor, d_logits: Tensor, targets: Tensor, tokens: Tensor, real: int, inverse_temperature: float
) -> None:
    """logits [c,v] float32 -> d_logits [c,v], which may begin where the logits do, row by row, and be narrower.

    `tokens` [5,c]: maximum and total of the softmax, slope of the log-prob, slope of the entropy, entropy.
    """
    count, columns = logits.shape
    _gradient[(count,)](
        logits,
        d_logits,
        targets,
        tokens,
        logits.stride(0),
        d_logits.stride(0),
        columns,
        real,
        count,
        inverse_temperature,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


@triton.jit
def _statistics(logits, targets, out, stride, columns, real, tokens, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    # Each lane keeps statistics of its own columns; they are merged once, at the end.
    maximum = tl.full([BLOCK], _PADDING, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logit = tl.load(base + at, mask=at < real, other=0.0) * inverse_temperature
        logit = tl.where(at < real, logit, _PADDING)
        higher = tl.maximum(maximum, logit)
        shift = maximum - higher
        scale = tl.exp(shift)
        power = tl.exp(logit - higher)
        weighted = scale * (weighted + shift * total) + power * (logit - higher)
        total = scale * total + power
        maximum = higher
    highest = tl.max(maximum, 0)
    shift = maximum - highest
    scale = tl.exp(shift)
    target = tl.load(targets + row)
    owned = (target >= 0) & (target < real)
    logit = tl.load(base + target, mask=owned, other=0.0) * inverse_temperature
    tl.store(out + row, highest)
    tl.store(out + tokens + row, tl.sum(scale * total, 0))
    tl.store(out + 2 * tokens + row, logit)
    tl.store(out + 3 * tokens + row, tl.sum(scale * (weighted + shift * total), 0))


@triton.jit
def _gradient(
    logits,
    d_logits,
    targets,
    softmax,
    stride,
    d_stride,
    columns,
    real,
    tokens,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    d_base = d_logits + row.to(tl.int64) * d_stride
    target = tl.load(targets + row)
    maximum = tl.load(softmax + row)
    total = tl.load(softmax + tokens + row)
    d_logp = tl.load(softmax + 2 * tokens + row) * inverse_temperature
    d_entropy = tl.load(softmax + 3 * tokens + row) * inverse_temperature
    entropy = tl.load(softmax + 4 * tokens + row)
    log_total = tl.log(total)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logit = tl.load(base + at, mask=at < real, other=0.0) * inverse_temperature
        # A narrower gradient overwrites logits of this block, and of no later one: all lanes must have read theirs.
        tl.debug_barrier()
        log_prob = tl.where(at < real, logit - maximum - log_total, _PADDING)
        slope = -tl.exp(log_prob) * (d_logp + d_entropy * (log_prob + entropy))
        slope += tl.where(at == target, d_logp, 0.0)
        tl.store(d_base + at, slope.to(d_logits.dtype.element_ty), mask=at < columns)
