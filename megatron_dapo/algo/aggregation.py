"""How token losses become one number, as a weight for each token: the loss is the sum of weight x loss.

Three modes times three scales, nine objectives:

    scale       token-mean                      seq-mean-token-sum   seq-mean-token-mean
    global      1 / N                           1 / S                the cell to the left / n
    group       1 / (P N_p)                     1 / (P S_p)          likewise
    reference   S_m / S_r / (N_m + 1e-8) / DP   1 / (S_r DP)         likewise

N tokens that count and S sequences in the mini-batch, N_p and S_p in a sequence's group, S_r on its data-parallel
rank, N_m and S_m in its micro-batch, n in the sequence itself; P groups, DP ranks.
A sequence in which no token counts has weight 0 and is counted in no S; a group of such sequences not in P.
Sources: DAPO, arXiv 2503.14476, eq. 8, for (group, token-mean); its public recipe for the row `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_dapo.config.tree import LossAggMode, LossScale

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SequenceLayout:
    """Where each sequence of a mini-batch is computed; only the scale `reference` depends on it."""

    dp_rank: NDArray[np.int64]  # [S]
    micro_batch: NDArray[np.int64]  # [S] unique within the rank
    dp_size: int


@dataclass(frozen=True)
class _Counted:
    """The sequences that count, and nothing of the others."""

    tokens: Floats  # [S] each above 0
    group: NDArray  # [S]
    layout: SequenceLayout | None


def sequence_weights(
    mode: LossAggMode,
    scale: LossScale,
    token_counts: ArrayLike,
    group_ids: ArrayLike,
    *,
    layout: SequenceLayout | None = None,
) -> Floats:
    """[S] the weight of each counted token of each sequence of one optimizer step's mini-batch.

    `global` and `group` do not depend on the layout; `reference` does, as the recipe's arithmetic does: it takes a
    masked mean per micro-batch, scales it by the micro-batch's share of its rank's sequences, and averages over ranks.

    Args:
        token_counts: [S] tokens that count.
        group_ids: [S] integers, one for each prompt group.
        layout: needed by `reference`.

    Raises:
        ValueError: lengths differ, a count is negative, or the layout is missing or names a rank that is not there.
    """
    tokens_S = np.asarray(token_counts, np.float64)
    group_S = np.asarray(group_ids)
    if tokens_S.ndim != 1 or tokens_S.shape != group_S.shape:
        raise ValueError(
            f"token_counts of shape {tokens_S.shape}, group_ids of shape {group_S.shape}; both must be [S]"
        )
    if (tokens_S < 0).any():
        raise ValueError(f"a token count is {tokens_S.min():g}; counts must be 0 or more")
    weights_S = np.zeros(len(tokens_S))
    counts_S = tokens_S > 0
    if counts_S.any():
        counted = _Counted(tokens_S[counts_S], group_S[counts_S], layout and _select(layout, counts_S))
        weights_S[counts_S] = _MODES[mode](counted, *_SCALES[scale](counted))
    return weights_S


def _select(layout: SequenceLayout, counts_S: NDArray[np.bool_]) -> SequenceLayout:
    shapes = (np.shape(layout.dp_rank), np.shape(layout.micro_batch))
    if shapes != (counts_S.shape, counts_S.shape):
        raise ValueError(f"dp_rank and micro_batch of shapes {shapes} for {len(counts_S)} sequences; both must be [S]")
    if not ((layout.dp_rank >= 0) & (layout.dp_rank < layout.dp_size)).all():
        raise ValueError(f"data-parallel ranks {np.unique(layout.dp_rank)} with dp_size {layout.dp_size}")
    return SequenceLayout(layout.dp_rank[counts_S], layout.micro_batch[counts_S], layout.dp_size)


def _total(keys_S: NDArray, values_S: Floats) -> Floats:
    """[S] the sum of `values_S` over all sequences with the same key; a key is one number or a row of them."""
    _, inverse_S = np.unique(keys_S, axis=0, return_inverse=True)
    inverse_S = inverse_S.reshape(-1)  # numpy 2.0.0 keeps the axis here
    totals: Floats = np.bincount(inverse_S, weights=values_S).astype(np.float64)
    return totals[inverse_S]


def _global(c: _Counted) -> tuple[Floats, Floats]:
    return np.full_like(c.tokens, 1 / c.tokens.sum()), np.full_like(c.tokens, 1 / len(c.tokens))


def _group(c: _Counted) -> tuple[Floats, Floats]:
    groups = len(np.unique(c.group))
    return 1 / (groups * _total(c.group, c.tokens)), 1 / (groups * _total(c.group, np.ones_like(c.tokens)))


def _reference(c: _Counted) -> tuple[Floats, Floats]:
    if c.layout is None:
        raise ValueError(
            "loss_scale reference depends on the layout and none was given; pass layout=SequenceLayout(...)"
        )
    ones_S = np.ones_like(c.tokens)
    micro_batch_S = np.stack([c.layout.dp_rank, c.layout.micro_batch], axis=1)
    on_rank_S = _total(c.layout.dp_rank, ones_S) * c.layout.dp_size
    return _total(micro_batch_S, ones_S) / on_rank_S / (_total(micro_batch_S, c.tokens) + 1e-8), 1 / on_rank_S


# (weight of a token under token-mean, weight of a sequence), [S] each
_SCALES: dict[LossScale, Callable[[_Counted], tuple[Floats, Floats]]] = {
    "global": _global,
    "group": _group,
    "reference": _reference,
}

_MODES: dict[LossAggMode, Callable[[_Counted, Floats, Floats], Floats]] = {
    "token-mean": lambda c, of_token, of_sequence: of_token,
    "seq-mean-token-sum": lambda c, of_token, of_sequence: of_sequence,
    "seq-mean-token-mean": lambda c, of_token, of_sequence: of_sequence / c.tokens,
}
