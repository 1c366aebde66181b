"""From sequences to what the model takes on this rank: padded, sharded over context parallelism, on the device.

Two layouts: packed (all sequences in one row) and padded (a row a sequence). In both, a sequence is padded on the right
until context parallelism can cut it, and the whole until sequence parallelism can. Position j of a sequence predicts
token j+1; the head computes only positions that predict a response token, and the last token, which predicts nothing,
is not computed at all.

Packed, sequences with the same prompt share it: it lies there once, before their responses (`PromptFamily`). Not under
context parallelism, which cuts each sequence by itself, nor with Transformer Engine, whose attention knows no families.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dapo.mcore.attention import PromptFamily, TorchAttentionInputs
from megatron_dapo.mcore.parallel import RankLayout, device
from megatron_dapo.types import MicroBatch, PlannedMicroBatch, SequenceBatch, TokenTerms, nonfinite_tokens


@dataclass(frozen=True)
class ModelInputs:
    """What `GPTModel.forward` takes. `b` rows of `t` tokens on this rank; b is 1 where packed."""

    token_ids: torch.Tensor  # [b, t]
    position_ids: torch.Tensor  # [b, t]
    packed: PackedSeqParams | None  # with torch's attention: always, and what it knows of the micro-batch


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

    positions: torch.Tensor  # [n] in the flattened [t, b] order of the hidden states; a shared prompt's end repeats
    targets: torch.Tensor  # [n] token ids
    source: torch.Tensor  # [n] which of the micro-batch's N response tokens each one is
    num_tokens: int  # N, over all context-parallel ranks
    terms: HeadTerms | None  # None: log-probs alone


@dataclass(frozen=True)
class RankBatch:
    model: ModelInputs
    head: HeadInputs


def rank_batch(
    micro_batch: MicroBatch | PlannedMicroBatch | SequenceBatch, layout: RankLayout, packed: bool, sp: bool
) -> RankBatch:
    """A micro-batch as this rank sees it; `sp`: sequence parallelism is on."""
    if isinstance(micro_batch, SequenceBatch):
        sequences, terms = micro_batch, None
    else:
        sequences, terms = micro_batch.sequences, micro_batch.terms
    rows = _packed_rows(sequences, layout, sp) if packed else _padded_rows(sequences, layout, sp)
    where = _local_columns(rows.segments, layout)
    local = np.full(rows.token_ids.shape[1], -1)
    local[where] = np.arange(len(where))
    chosen = np.flatnonzero(local[rows.column_N] >= 0)
    positions = local[rows.column_N[chosen]] * len(rows.token_ids) + rows.row_N[chosen]  # hidden states are [t, b, h]
    response_tokens = _response_tokens(sequences)
    target = device()
    position_ids = torch.from_numpy(rows.position_ids[:, where]).to(target)
    return RankBatch(
        model=ModelInputs(
            token_ids=torch.from_numpy(rows.token_ids[:, where]).to(target),
            position_ids=position_ids,
            packed=_attention_inputs(rows, position_ids[0], layout, packed),
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
    """The whole micro-batch before it is cut over context-parallel ranks: [b, total] arrays, N response tokens."""

    token_ids: np.ndarray
    position_ids: np.ndarray
    row_N: np.ndarray  # where the position lies that predicts each response token
    column_N: np.ndarray
    families: list[PromptFamily]  # what lies one after another in each row, padding included

    @property
    def segments(self) -> list[int]:
        return [family.tokens for family in self.families]


def _packed_rows(batch: SequenceBatch, layout: RankLayout, sp: bool) -> _Rows:
    unit, whole = _units(layout, sp)
    shared = layout.cp_size == 1 and not torch.cuda.is_available()
    sets = _with_the_same_prompt(batch) if shared else [[index] for index in range(len(batch))]
    families = [_family(batch, indices, unit) for indices in sets]
    total = sum(family.tokens for family in families)
    padding = _round_up(total, whole) - total
    rows = _empty_rows(1, total + padding, families + ([PromptFamily(padding)] if padding else []), batch)
    start = 0
    for indices, family in zip(sets, families, strict=True):
        at = start + int(batch.prompt_lengths[indices[0]])
        for index in indices:
            _write_sequence(rows, batch, index, 0, start, at)
            at += int(batch.response_lengths[index]) - 1
        start += family.tokens
    return rows


def _padded_rows(batch: SequenceBatch, layout: RankLayout, sp: bool) -> _Rows:
    length = _round_up(int(batch.lengths.max()) - 1, _units(layout, sp)[1])
    rows = _empty_rows(len(batch), length, [PromptFamily(length)], batch)
    rows.position_ids[:] = np.arange(length)
    for index in range(len(batch)):
        _write_sequence(rows, batch, index, index, 0, int(batch.prompt_lengths[index]))
    return rows


def _units(layout: RankLayout, sp: bool) -> tuple[int, int]:
    """What the length of a sequence, and that of a whole row, has to be a multiple of."""
    sequence = 2 * layout.cp_size if layout.cp_size > 1 else 1
    return sequence, math.lcm(sequence, layout.cp_size * (layout.tp_size if sp else 1))


def _with_the_same_prompt(batch: SequenceBatch) -> list[list[int]]:
    """The sequences by prompt, in the order in which prompts come first."""
    sets: dict[bytes, list[int]] = {}
    for index, (start, prompt) in enumerate(zip(batch.cu_seqlens[:-1], batch.prompt_lengths, strict=True)):
        sets.setdefault(batch.token_ids[start : start + prompt].tobytes(), []).append(index)
    return list(sets.values())


def _family(batch: SequenceBatch, indices: list[int], unit: int) -> PromptFamily:
    """One sequence is a family without responses: all of it is computed as one causal segment."""
    if len(indices) == 1:
        return PromptFamily(_round_up(int(batch.lengths[indices[0]]) - 1, unit))
    responses = tuple(int(batch.response_lengths[index]) - 1 for index in indices)
    return PromptFamily(int(batch.prompt_lengths[indices[0]]), responses)


def _empty_rows(count: int, total: int, families: list[PromptFamily], batch: SequenceBatch) -> _Rows:
    tokens = int(batch.cu_responses[-1])
    return _Rows(
        token_ids=np.zeros((count, total), np.int64),
        position_ids=np.zeros((count, total), np.int64),
        row_N=np.empty(tokens, np.int64),
        column_N=np.empty(tokens, np.int64),
        families=families,
    )


def _write_sequence(rows: _Rows, batch: SequenceBatch, index: int, row: int, start: int, at: int) -> None:
    """The prompt to column `start`, the response but for its last token to column `at`."""
    begin, end, prompt = batch.cu_seqlens[index], batch.cu_seqlens[index + 1] - 1, int(batch.prompt_lengths[index])
    for column, first, tokens in (
        (start, 0, batch.token_ids[begin : begin + prompt]),
        (at, prompt, batch.token_ids[begin + prompt : end]),
    ):
        rows.token_ids[row, column : column + len(tokens)] = tokens
        rows.position_ids[row, column : column + len(tokens)] = np.arange(first, first + len(tokens))
    predicts = slice(int(batch.cu_responses[index]), int(batch.cu_responses[index + 1]))
    rows.row_N[predicts] = row
    rows.column_N[predicts] = np.arange(at - 1, at - 1 + predicts.stop - predicts.start)
    rows.column_N[predicts.start] = start + prompt - 1


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


def _attention_inputs(
    rows: _Rows, position_ids: torch.Tensor, layout: RankLayout, packed: bool
) -> PackedSeqParams | None:
    """What the attention in use wants: Transformer Engine's is told where packed sequences end, torch's everything."""
    if not torch.cuda.is_available():
        n = layout.cp_size
        local = tuple(PromptFamily(f.prompt // n, f.responses) for f in rows.families)  # n > 1: no responses
        return TorchAttentionInputs.of(local, position_ids, packed)
    if not packed:
        return None
    segments = rows.segments
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
    """[N] the response tokens, sequence by sequence, int64."""
    in_sequence = np.arange(len(batch.token_ids)) - np.repeat(batch.cu_seqlens[:-1], batch.lengths)
    return batch.token_ids[in_sequence >= np.repeat(batch.prompt_lengths, batch.lengths)].astype(np.int64)


def _head_terms(terms: TokenTerms, sequences: SequenceBatch, chosen: np.ndarray, target: torch.device) -> HeadTerms:
    """A token with a log-prob that is not finite gets weight and log-probs of 0, so that no NaN spreads."""
    sequence = np.repeat(np.arange(len(sequences)), sequences.response_lengths)[chosen]
    logps = [None if logp is None else logp[chosen] for logp in (terms.old_logp, terms.ref_logp, terms.rollout_logp)]
    silent = nonfinite_tokens(*logps)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(target)

    def silenced(values: np.ndarray) -> torch.Tensor:
        values[silent] = 0
        return tensor(values)

    old_logp, ref_logp, rollout_logp = (None if logp is None else silenced(logp) for logp in logps)
    return HeadTerms(
        weight=silenced(terms.weight[sequence]),
        advantage=tensor(terms.advantage[sequence]),
        old_logp=old_logp,
        ref_logp=ref_logp,
        rollout_logp=rollout_logp,
        sequence=torch.from_numpy(sequence).to(target),
        num_sequences=len(sequences),
    )


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
