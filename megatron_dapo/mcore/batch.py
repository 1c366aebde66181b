"""From sequences to what the model takes on this rank: padded, sharded over context parallelism, on the device.

Two layouts: packed (all sequences in one row, `cu_seqlens` between them) and padded (a row a sequence). In both, a
sequence is padded on the right until context parallelism can cut it, and the whole until sequence parallelism can.
Position j of a sequence predicts token j+1; the head computes only positions that predict a response token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dapo.mcore.parallel import RankLayout, device
from megatron_dapo.types import MicroBatch, SequenceBatch, TokenTerms


@dataclass(frozen=True)
class ModelInputs:
    """What `GPTModel.forward` takes. `b` rows of `t` tokens on this rank; b is 1 where packed."""

    token_ids: torch.Tensor  # [b, t]
    position_ids: torch.Tensor  # [b, t]
    packed: PackedSeqParams | None


@dataclass(frozen=True)
class HeadTerms:
    """The loss's terms at this rank's predicting positions, [n] each, float32; see `TokenTerms`."""

    weight: torch.Tensor
    advantage: torch.Tensor
    old_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    rollout_logp: torch.Tensor | None
    sequence: torch.Tensor  # which of the micro-batch's sequences each token belongs to, int64
    num_sequences: int  # of the micro-batch, over all context-parallel ranks


@dataclass(frozen=True)
class HeadInputs:
    """What the head needs of a micro-batch. `n` of this rank's `b*t` positions predict a response token."""

    positions: torch.Tensor  # [n] in the flattened [t, b] order of the hidden states
    targets: torch.Tensor  # [n] token ids
    source: torch.Tensor  # [n] which of the micro-batch's N response tokens each one is
    num_tokens: int  # N, over all context-parallel ranks
    terms: HeadTerms | None  # None: log-probs alone


@dataclass(frozen=True)
class RankBatch:
    model: ModelInputs
    head: HeadInputs


def rank_batch(micro_batch: MicroBatch | SequenceBatch, layout: RankLayout, packed: bool, sp: bool) -> RankBatch:
    """A micro-batch as this rank sees it; `sp`: sequence parallelism is on."""
    if isinstance(micro_batch, MicroBatch):
        sequences, terms = micro_batch.sequences, micro_batch.terms
    else:
        sequences, terms = micro_batch, None
    rows = _packed_rows(sequences, layout, sp) if packed else _padded_rows(sequences, layout, sp)
    where = _local_columns(rows.segments, layout)
    source = rows.source[:, where]  # [b, t]; -1: predicts nothing
    flat = source.T.reshape(-1)  # hidden states are [t, b, h]
    positions = np.flatnonzero(flat >= 0)
    response_tokens = _response_tokens(sequences)
    chosen = flat[positions]
    target = device()
    return RankBatch(
        model=ModelInputs(
            token_ids=torch.from_numpy(rows.token_ids[:, where]).to(target),
            position_ids=torch.from_numpy(rows.position_ids[:, where]).to(target),
            packed=_packed_params(rows.segments) if packed else None,
        ),
        head=HeadInputs(
            positions=torch.from_numpy(positions).to(target),
            targets=torch.from_numpy(response_tokens[chosen]).to(target),
            source=torch.from_numpy(chosen).to(target),
            num_tokens=len(response_tokens),
            terms=None if terms is None else _head_terms(terms, sequences, chosen, target),
        ),
    )


@dataclass(frozen=True)
class _Rows:
    """The whole micro-batch before it is cut over context-parallel ranks: [b, total] arrays."""

    token_ids: np.ndarray
    position_ids: np.ndarray
    source: np.ndarray
    segments: list[int]  # padded lengths that lie one after another in each row


def _packed_rows(batch: SequenceBatch, layout: RankLayout, sp: bool) -> _Rows:
    unit, whole = _units(layout, sp)
    segments = [_round_up(int(length), unit) for length in batch.lengths]
    segments[-1] += _round_up(sum(segments), whole) - sum(segments)
    rows = _empty_rows(1, sum(segments), segments)
    start = 0
    for index, segment in enumerate(segments):
        _write_sequence(rows, batch, index, 0, start, segment)
        start += segment
    return rows


def _padded_rows(batch: SequenceBatch, layout: RankLayout, sp: bool) -> _Rows:
    length = _round_up(int(batch.lengths.max()), _units(layout, sp)[1])
    rows = _empty_rows(len(batch), length, [length])
    for index in range(len(batch)):
        _write_sequence(rows, batch, index, index, 0, length)
    return rows


def _units(layout: RankLayout, sp: bool) -> tuple[int, int]:
    """What the length of a sequence, and that of a whole row, has to be a multiple of."""
    sequence = 2 * layout.cp_size if layout.cp_size > 1 else 1
    return sequence, math.lcm(sequence, layout.cp_size * (layout.tp_size if sp else 1))


def _empty_rows(count: int, total: int, segments: list[int]) -> _Rows:
    return _Rows(
        token_ids=np.zeros((count, total), np.int64),
        position_ids=np.zeros((count, total), np.int64),
        source=np.full((count, total), -1, np.int64),
        segments=segments,
    )


def _write_sequence(rows: _Rows, batch: SequenceBatch, index: int, row: int, start: int, segment: int) -> None:
    begin, end = batch.cu_seqlens[index], batch.cu_seqlens[index + 1]
    prompt, length = int(batch.prompt_lengths[index]), int(end - begin)
    rows.token_ids[row, start : start + length] = batch.token_ids[begin:end]
    rows.position_ids[row, start : start + segment] = np.arange(segment)
    first, last = batch.cu_responses[index], batch.cu_responses[index + 1]
    rows.source[row, start + prompt - 1 : start + length - 1] = np.arange(first, last)


def _local_columns(segments: list[int], layout: RankLayout) -> np.ndarray:
    """Which columns this context-parallel rank holds: of each segment's 2n chunks, chunk i and chunk 2n-1-i."""
    n, i = layout.cp_size, layout.cp_rank
    if n == 1:
        return np.arange(sum(segments))
    parts, start = [], 0
    for segment in segments:
        chunk = segment // (2 * n)
        for number in (i, 2 * n - 1 - i):
            parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        start += segment
    return np.concatenate(parts)


def _packed_params(segments: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(segments)]).astype(np.int32)).to(device())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max(segments),
        max_seqlen_kv=max(segments),
    )


def _response_tokens(batch: SequenceBatch) -> np.ndarray:
    """[N] the response tokens, sequence by sequence."""
    in_sequence = np.arange(len(batch.token_ids)) - np.repeat(batch.cu_seqlens[:-1], batch.lengths)
    return batch.token_ids[in_sequence >= np.repeat(batch.prompt_lengths, batch.lengths)]


def _head_terms(terms: TokenTerms, sequences: SequenceBatch, chosen: np.ndarray, target: torch.device) -> HeadTerms:
    def at(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[chosen], np.float32)).to(target)

    def where_given(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else at(values)

    sequence = np.repeat(np.arange(len(sequences)), sequences.response_lengths)[chosen]
    return HeadTerms(
        weight=at(terms.weight),
        advantage=at(terms.advantage),
        old_logp=where_given(terms.old_logp),
        ref_logp=where_given(terms.ref_logp),
        rollout_logp=where_given(terms.rollout_logp),
        sequence=torch.from_numpy(sequence).to(target),
        num_sequences=len(sequences),
    )


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
