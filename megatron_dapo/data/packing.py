"""Which data-parallel rank and which micro-batch each sequence of a mini-batch goes to.

Two levels of one rule, longest processing time first (Graham, 1969): sequences, costliest first, each to the rank
with the least cost so far; then within a rank each to the micro-batch with the fewest tokens so far. The plan is a
function of its arguments alone. What a micro-batch holds is built in `minibatch.py`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from megatron_dapo.types import IntArray

Bins = list[list[int]]  # [bin] indices of its sequences
Plan = tuple[tuple[tuple[int, ...], ...], ...]  # [data-parallel rank][micro-batch] indices of its sequences


def plan_micro_batches(
    lengths: IntArray,
    dp_size: int,
    *,
    max_tokens: int | None = None,
    max_sequences: int | None = None,
    multiple_of: int = 1,
    quadratic: float = 0.0,
) -> Plan:
    """Every sequence of `lengths` [S] exactly once, and on each rank the same number of micro-batches.

    A micro-batch holds at most `max_tokens` tokens or at most `max_sequences` sequences: one of the two is given.
    The number of micro-batches is as small as best-fit-decreasing packing gets it on the fullest rank, rounded up to
    a multiple of `multiple_of` (an interleaved pipeline's stages). A rank with fewer has empty ones, which come last;
    larger ones come first. Ranks are balanced by the cost l + quadratic·l² of a sequence of l tokens; a causal dense
    transformer has quadratic = 1 / (12·hidden size): 24·hidden² operations a token and layer in the matrix products
    against 2·hidden·l in attention.

    Raises:
        ValueError: a sequence is longer than `max_tokens`, there is no sequence, or not one limit is given.
    """
    if (max_tokens is None) == (max_sequences is None):
        raise ValueError(
            f"max_tokens={max_tokens} and max_sequences={max_sequences}; give one of the two as the micro-batch's limit"
        )
    if not len(lengths):
        raise ValueError("no sequence to pack; a mini-batch has at least one")
    if max_tokens is not None and lengths.max() > max_tokens:
        over = int((lengths > max_tokens).sum())
        raise ValueError(
            f"{over} of {len(lengths)} sequences are longer than a micro-batch's {max_tokens} tokens (sequence "
            f"{int(lengths.argmax())} has {int(lengths.max())}); raise the micro-batch's limit to at least that, or "
            "lower the prompt and response limits"
        )
    cost_S = lengths + quadratic * lengths.astype(np.float64) ** 2
    # With a limit on sequences, ranks of unequal counts would need more micro-batches than the counts call for.
    per_rank = None if max_sequences is None else -(-len(lengths) // dp_size)
    ranks = _spread(np.arange(len(lengths)), cost_S, dp_size, per_rank)
    if max_tokens is not None:
        packed = [_best_fit(indices, lengths, max_tokens) for indices in ranks]
    else:
        packed = [_chunks(indices, max_sequences or 1) for indices in ranks]
    count = -(-max(len(bins) for bins in packed) // multiple_of) * multiple_of
    return tuple(_ordered(_evened(bins, count, lengths, max_tokens, max_sequences), lengths) for bins in packed)


def _spread(indices: NDArray[np.intp], weight_S: NDArray, bins: int, most: int | None) -> Bins:
    """`indices` over `bins`, heaviest first, each to the lightest bin that holds fewer than `most`."""
    held: Bins = [[] for _ in range(bins)]
    loads = [(0.0, number) for number in range(bins)]
    heapify(loads)
    for index in _heaviest_first(indices, weight_S):
        load, number = heappop(loads)
        held[number].append(index)
        if most is None or len(held[number]) < most:
            heappush(loads, (load + float(weight_S[index]), number))
    return held


def _best_fit(indices: Sequence[int], lengths: IntArray, max_tokens: int) -> Bins:
    """Longest first, each into the fullest bin that still has room, or a new one: at most 11/9 of the fewest bins."""
    held: Bins = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in _heaviest_first(np.array(indices, np.intp), lengths):
        length = int(lengths[index])
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = max_tokens, len(held)
            held.append([])
        held[number].append(index)
        insort(room, (left - length, number))
    return held


def _chunks(indices: Sequence[int], most: int) -> Bins:
    return [list(indices[start : start + most]) for start in range(0, len(indices), most)]


def _evened(bins: Bins, count: int, lengths: IntArray, max_tokens: int | None, max_sequences: int | None) -> Bins:
    """The same sequences over `count` bins of about equal tokens; where that breaks the limit, `bins` as they are."""
    indices = np.array([index for held in bins for index in held], np.intp)
    even = _spread(indices, lengths, count, max_sequences)
    if max_tokens is None or all(lengths[held].sum() <= max_tokens for held in even):
        return even
    return bins + [[] for _ in range(count - len(bins))]


def _ordered(bins: Bins, lengths: IntArray) -> tuple[tuple[int, ...], ...]:
    """Most tokens first, so that the largest allocation comes first and ranks meet bins of like size."""
    keyed = sorted((-int(lengths[held].sum()), sorted(held)) for held in bins)
    return tuple(tuple(held) for _, held in keyed)


def _heaviest_first(indices: NDArray[np.intp], weight_S: NDArray) -> list[int]:
    return indices[np.lexsort((indices, -weight_S[indices]))].tolist()
