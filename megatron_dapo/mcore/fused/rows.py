"""A rank's share of the softmax on CUDA: products by cuBLAS, what lies between them by two Triton kernels.

Logits lie [c,v] in float32, straight from the product's accumulator where torch can (2.8 and later; before, through
the weight's type). The gradient is written over them in the weight's type, which the products take; their sums are
float32 again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dapo.mcore.fused import kernels
from megatron_dapo.mcore.fused.softmax import STATISTICS, Slopes, Softmax, Vocabulary

_ALIGNMENT = 16  # elements: rows that cuBLAS reads at full speed
_BLOCK_BYTES = 256 * 2**20  # of a product that is not added in place
_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()  # low-precision factors, float32 result


class RowShard:
    """See `VocabularyShard`. `weight` [v,h]; chunks have `tokens` tokens at most."""

    def __init__(self, weight: Tensor, vocabulary: Vocabulary, temperature: float, tokens: int):
        self._weight, self._inverse = weight, 1.0 / temperature
        rows = weight.size(0)
        self._first, self._real = vocabulary.first_row(rows), vocabulary.real_rows(rows)
        width = -(-rows // _ALIGNMENT) * _ALIGNMENT
        self._buffer = weight.new_empty(tokens, width, dtype=torch.float32)

    def statistics(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self._hidden, self._targets = hidden, targets - self._first
        found = hidden.new_empty(STATISTICS, len(hidden), dtype=torch.float32)
        logits = self._logits()
        _product(hidden, self._weight.T, logits)
        kernels.row_statistics(logits, self._targets, found, self._real, self._inverse)
        return found

    def backward(self, softmax: Softmax, slopes: Slopes, d_hidden: Tensor, d_weight: Tensor) -> None:
        logits = self._logits()
        d_logits = self._buffer.view(self._weight.dtype)[: len(self._hidden), : logits.size(1)]
        d_entropy = torch.zeros_like(slopes.logp) if slopes.entropy is None else slopes.entropy
        tokens = torch.stack([softmax.maximum, softmax.total, slopes.logp, d_entropy, softmax.entropy])
        kernels.row_gradient(logits, d_logits, self._targets, tokens, self._real, self._inverse)
        torch.mm(d_logits, self._weight, out=d_hidden)
        _add_product(d_logits.T, self._hidden, d_weight)

    def _logits(self) -> Tensor:
        return self._buffer[: len(self._hidden), : self._weight.size(0)]


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left @ right into the float32 `out`."""
    if left.dtype is out.dtype:
        torch.mm(left, right, out=out)
    elif _WIDE_PRODUCTS and out.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left @ right)


def _add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """left @ right added to the float32 `total`, block of rows after block of rows where it needs a temporary."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    elif _WIDE_PRODUCTS and total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        size = max(1, _BLOCK_BYTES // (total.element_size() * total.size(1)))
        for start in range(0, len(total), size):
            total[start : start + size] += left[start : start + size] @ right
