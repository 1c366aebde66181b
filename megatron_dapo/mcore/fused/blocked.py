"""A rank's share of the softmax in torch, by blocks of vocabulary rows that stay in a CPU's cache.

Logits lie [v,c]: a block of rows is contiguous, and the products with the weight run fastest so. A block is
exponentiated against its own maximum while it is hot; the blocks' statistics are merged as those of ranks are. One
[v,c] buffer holds the exponentials until the gradient's products; without a gradient only a block is held.

What is no product costs: so the exponentials e of a block are never made probabilities p = scale e or slopes. With
d_logits = slope (1[target] - p), the factor -slope scale of a token is put on its hidden state for dW and on the
block's product eᵀW for dh, [c,h] both; the target's own entry of e is made 0 and its slope (1 - p) added as a row, so
that nothing cancels where p is close to 1. Only a gradient of the entropy needs log p of each entry, and is written
over the exponentials.

Powers are of 2, torch's fastest: hidden states are multiplied by log2(e) / temperature, statistics given in base e.
Everything is computed in float32 (float64 where that is given), a bfloat16 weight block by block: products and sums
are never rounded to bfloat16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dapo.mcore.fused.softmax import PADDING, STATISTICS, Slopes, Softmax, Vocabulary, merge

BLOCK_BYTES = 4 * 2**20


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are held in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class BlockedShard:
    """See `VocabularyShard`. `weight` [v,h]; chunks have `tokens` tokens at most."""

    def __init__(self, weight: Tensor, vocabulary: Vocabulary, temperature: float, tokens: int, keep: bool):
        self._weight, self._temperature, self._keep = weight, temperature, keep
        self._dtype = compute_type(weight.dtype)
        rows = weight.size(0)
        self._first, self._real = vocabulary.first_row(rows), vocabulary.real_rows(rows)
        size = min(rows, max(1, BLOCK_BYTES // (self._dtype.itemsize * max(1, tokens))))
        self._blocks = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        self._buffer = weight.new_empty((rows if keep else size) * tokens, dtype=self._dtype)
        self._scratch = weight.new_empty(size * tokens, dtype=self._dtype)

    def statistics(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self._hidden, self._targets = hidden.to(self._dtype), targets - self._first
        self._columns = torch.arange(len(targets), device=targets.device)
        bits = self._hidden * (math.log2(math.e) / self._temperature)
        self._found = hidden.new_empty(len(self._blocks), STATISTICS, len(targets), dtype=self._dtype)
        for block, found in zip(self._blocks, self._found, strict=True):
            self._block_statistics(*block, bits, found)
        maximum, _, target, weighted = self._found.unbind(1)
        for in_bits in (maximum, target, weighted):
            in_bits *= math.log(2)
        return self._found[0] if len(self._blocks) == 1 else merge(self._found)

    def backward(self, softmax: Softmax, slopes: Slopes, d_hidden: Tensor, d_weight: Tensor) -> None:
        total = self._target_gradient(softmax, slopes, d_weight)
        product = torch.empty_like(total)
        scales = (self._found[:, 0] - softmax.maximum).exp_().div_(softmax.total)
        for (start, stop), scale in zip(self._blocks, scales, strict=True):
            held = self._held(start, stop)
            if slopes.entropy is None:
                factor = slopes.logp * scale
            else:
                self._write_gradient(held, scale, softmax, slopes, slopes.entropy)
                factor = torch.ones_like(scale)
            factor = factor[:, None].mul_(-1 / self._temperature)
            torch.mm(held.T, self._rows(start, stop), out=product)
            total.addcmul_(product, factor)
            d_weight[start:stop].addmm_(held, torch.mul(self._hidden, factor, out=product))
        d_hidden.copy_(total)

    def _block_statistics(self, start: int, stop: int, bits: Tensor, found: Tensor) -> None:
        logits, powers = self._view(self._scratch, 0, stop - start), self._held(start, stop)
        maximum, total, target, weighted = found.unbind(0)
        torch.mm(self._rows(start, stop), bits.T, out=logits)
        if stop > self._real:
            logits[max(0, self._real - start) :] = PADDING
        place, owned = self._target_places(start, stop)
        torch.mul(logits.view(-1)[place], owned, out=target)
        torch.amax(logits, 0, out=maximum)
        logits -= maximum
        torch.exp2(logits, out=powers)
        torch.sum(powers, 0, out=total)
        logits *= powers
        torch.sum(logits, 0, out=weighted)
        powers.view(-1)[place] *= ~owned

    def _target_gradient(self, softmax: Softmax, slopes: Slopes, d_weight: Tensor) -> Tensor:
        """What the targets' own logits give: added to that of the weight, returned [c,h] of the hidden states."""
        owned = (self._targets >= 0) & (self._targets < self._real)
        rows = self._targets.clamp(0, len(self._weight) - 1)
        d_target = slopes.logp * -torch.expm1(softmax.logp)
        if slopes.entropy is not None:
            d_target -= slopes.entropy * softmax.logp.exp() * (softmax.logp + softmax.entropy)
        d_target = (d_target * owned / self._temperature)[:, None]
        d_weight.index_add_(0, rows, self._hidden * d_target)
        return self._weight[rows].to(self._dtype).mul_(d_target)

    def _write_gradient(self, held: Tensor, scale: Tensor, softmax: Softmax, slopes: Slopes, d_entropy: Tensor) -> None:
        """Over the exponentials [block,c]: d_logp p + d_entropy p (log p + entropy)."""
        held *= scale
        plogp = torch.special.entr(held, out=self._view(self._scratch, 0, len(held)))  # -p log p; 0 at p = 0
        held *= slopes.logp + d_entropy * softmax.entropy
        held.addcmul_(plogp, d_entropy, value=-1)

    def _target_places(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where in the flat block each token's target lies, and whether it is there at all (else: anywhere)."""
        row = self._targets - start
        owned = (row >= 0) & (row < stop - start)
        return row.clamp_(0, stop - start - 1).mul_(len(self._columns)).add_(self._columns), owned

    def _rows(self, start: int, stop: int) -> Tensor:
        return self._weight[start:stop].to(self._dtype)

    def _held(self, start: int, stop: int) -> Tensor:
        return self._view(self._buffer, start if self._keep else 0, stop - start)

    def _view(self, buffer: Tensor, start: int, rows: int) -> Tensor:
        c = len(self._columns)
        return buffer[start * c : (start + rows) * c].view(rows, c)
