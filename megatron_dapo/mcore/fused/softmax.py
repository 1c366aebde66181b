"""The softmax of a chunk of tokens over a vocabulary that tensor parallelism splits, and who computes a rank's share.

Axes: `n` tokens, `c` tokens of a chunk, `h` hidden size, `v` rows of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# What the logits of one chunk may take where nothing else is said, by device type: `benchmarks/fused_loss.py`.
LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
STATISTICS = 4  # a token
PADDING = -1e30  # the logit of a padded row: its exponential is 0, and a sum of such logits is still finite


@dataclass(frozen=True)
class Vocabulary:
    """How the vocabulary lies over tensor parallelism: `size` real rows, padding behind them."""

    size: int
    group: dist.ProcessGroup
    logits_bytes: int  # what the logits of one chunk may take on a rank, in the type they are computed in

    def first_row(self, rows: int) -> int:
        """The first of this rank's `rows`."""
        return self.group.rank() * rows

    def real_rows(self, rows: int) -> int:
        """How many of this rank's `rows` are not padding; they come first."""
        return max(0, min(rows, self.size - self.first_row(rows)))

    def chunks(self, tokens: int, rows: int, itemsize: int) -> list[slice]:
        """Token ranges, as equal as can be, whose logits keep to the budget; one token at least."""
        most = max(1, self.logits_bytes // (itemsize * rows))
        size = max(1, -(-tokens // -(-tokens // most))) if tokens else 1
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


@dataclass(frozen=True)
class Softmax:
    """Over the whole vocabulary, [c] each: exp(logit - maximum) / total is a token's probability."""

    maximum: Tensor
    total: Tensor
    logp: Tensor  # of the target
    entropy: Tensor


@dataclass(frozen=True)
class Slopes:
    """Of the weighted loss with respect to a token's log-prob and entropy, [c] each; None: the entropy has none."""

    logp: Tensor
    entropy: Tensor | None


class VocabularyShard(Protocol):
    """This rank's rows. `statistics` of a chunk comes first; `backward` is of the chunk that was last."""

    def statistics(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [c,h], targets [c] -> [4,c]: maximum, sum of e, target's logit, sum of e x (logit - maximum).

        e = exp(logit - maximum); the third is 0 where the target is another rank's.
        """
        ...

    def backward(self, softmax: Softmax, slopes: Slopes, d_hidden: Tensor, d_weight: Tensor) -> None:
        """Write the gradient of the chunk's hidden states [c,h], add to that of the weight [v,h]."""
        ...


def combine(statistics: Tensor, group: dist.ProcessGroup) -> Softmax:
    """This rank's statistics [4,c] and, in one all-gather, those of the others."""
    size = group.size()
    if size > 1:
        gathered = statistics.new_empty(size * STATISTICS, statistics.size(1))
        dist.all_gather_into_tensor(gathered, statistics, group=group)
        statistics = merge(gathered.view(size, STATISTICS, -1))
    maximum, total, target, weighted = statistics.unbind(0)
    log_total = total.log()
    return Softmax(maximum, total, target - maximum - log_total, log_total - weighted / total)


def merge(parts: Tensor) -> Tensor:
    """[parts,4,c], statistics of disjoint parts of the vocabulary -> [4,c], those of their union."""
    local_maximum, total, target, weighted = parts.unbind(1)
    maximum = local_maximum.amax(0)
    shift = local_maximum - maximum
    scale = shift.exp()
    return torch.stack(
        [maximum, (scale * total).sum(0), target.sum(0), (scale * (weighted + shift * total)).sum(0)],
    )
