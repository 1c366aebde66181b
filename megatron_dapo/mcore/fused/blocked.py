"""A rank's share of the softmax in torch, by blocks of vocabulary rows that stay in a CPU's cache.

Logits lie [v,c]: a block of rows is contiguous, and the products with the weight run fastest so. A block is
exponentiated against its own maximum while it is hot; the blocks' statistics are merged as those of ranks are. One
[v,c] buffer holds the exponentials and then, in place, the gradient; without a gradient only a block is held.
Everything is computed in float32 (float64 where that is given), a bfloat16 weight block by block: products and sums
are never rounded to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dapo.mcore.fused.softmax import PADDING, STATISTICS, Slopes, Softmax, Vocabulary, merge

BLOCK_BYTES = 2 * 2**20


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
        self._hidden = hidden.to(self._dtype)
        if self._temperature != 1.0:
            self._hidden = self._hidden / self._temperature
        self._columns = torch.arange(len(targets), device=targets.device)
        self._places = [self._target_places(targets - self._first, start, stop) for start, stop in self._blocks]
        self._found = hidden.new_empty(len(self._blocks), STATISTICS, len(targets), dtype=self._dtype)
        for index in range(len(self._blocks)):
            self._block_statistics(index, self._found[index])
        return self._found[0] if len(self._blocks) == 1 else merge(self._found)

    def backward(self, softmax: Softmax, slopes: Slopes, d_hidden: Tensor, d_weight: Tensor) -> None:
        direct = d_hidden.dtype is self._dtype
        total = d_hidden if direct else torch.empty_like(d_hidden, dtype=self._dtype)
        scales = (self._found[:, 0] - softmax.maximum).exp_().div_(softmax.total)
        for index, (start, stop) in enumerate(self._blocks):
            d_logits = self._block_gradient(index, scales[index], softmax, slopes)
            torch.addmm(total, d_logits.T, self._rows(start, stop), beta=1 if start else 0, out=total)
            d_weight[start:stop].addmm_(d_logits, self._hidden)
        if self._temperature != 1.0:
            total /= self._temperature
        if not direct:
            d_hidden.copy_(total)

    def _block_statistics(self, index: int, found: Tensor) -> None:
        start, stop = self._blocks[index]
        logits, powers = self._held(start, stop), self._view(self._scratch, 0, stop - start)
        maximum, total, target, weighted = found.unbind(0)
        torch.mm(self._rows(start, stop), self._hidden.T, out=logits)
        if stop > self._real:
            logits[max(0, self._real - start) :] = PADDING
        place, owned = self._places[index]
        torch.mul(logits.view(-1)[place], owned, out=target)
        torch.amax(logits, 0, out=maximum)
        logits -= maximum
        torch.exp(logits, out=powers)
        torch.sum(powers, 0, out=total)
        logits *= powers
        torch.sum(logits, 0, out=weighted)
        if self._keep:
            logits.copy_(powers)

    def _block_gradient(self, index: int, scale: Tensor, softmax: Softmax, slopes: Slopes) -> Tensor:
        """[block,c], where its exponentials were: d_logp (1[target] - p) - d_entropy p (log p + entropy)."""
        start, stop = self._blocks[index]
        held = self._held(start, stop)
        place, owned = self._places[index]
        if slopes.entropy is None:
            held *= -slopes.logp * scale
        else:
            held *= scale
            plogp = torch.special.entr(held, out=self._view(self._scratch, 0, stop - start))  # -p log p; 0 at p = 0
            held *= -(slopes.logp + slopes.entropy * softmax.entropy)
            held.addcmul_(plogp, slopes.entropy)
        held.view(-1).index_add_(0, place, slopes.logp * owned)
        return held

    def _target_places(self, targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where in the flat block each token's target lies, and whether it is there at all (else: anywhere)."""
        row = targets - start
        owned = (row >= 0) & (row < stop - start)
        return row.clamp_(0, stop - start - 1).mul_(len(self._columns)).add_(self._columns), owned

    def _rows(self, start: int, stop: int) -> Tensor:
        return self._weight[start:stop].to(self._dtype)

    def _held(self, start: int, stop: int) -> Tensor:
        return self._view(self._buffer, start if self._keep else 0, stop - start)

    def _view(self, buffer: Tensor, start: int, rows: int) -> Tensor:
        c = len(self._columns)
        return buffer[start * c : (start + rows) * c].view(rows, c)
