"""Mini-batches of whole groups, and the micro-batches that one optimizer update trains on.

Which sequence goes where is decided in `packing.py`, what a token weighs in `algo/aggregation.py`; here the two
meet. Axes: `S` sequences of the mini-batch, `N` its response tokens back to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dapo.algo.aggregation import SequenceLayout, sequence_weights
from megatron_dapo.config.tree import LossAggMode, LossScale
from megatron_dapo.data.packing import Plan
from megatron_dapo.types import FloatArray, Group, IntArray, MicroBatch, SequenceBatch, TokenTerms


def mini_batches(groups: Sequence[Group], groups_per_mini_batch: int) -> list[tuple[Group, ...]]:
    """Whole groups, cut in the order given. What is left over makes a last, smaller mini-batch."""
    return [
        tuple(groups[start : start + groups_per_mini_batch]) for start in range(0, len(groups), groups_per_mini_batch)
    ]


@dataclass(frozen=True)
class MiniBatch:
    """S sequences and what the loss needs of them, before it is known where each is computed."""

    sequences: SequenceBatch
    group_ids: IntArray  # [S]
    truncated: NDArray[np.bool_]  # [S] ended by the length limit
    advantages: NDArray[np.floating]  # [S]
    old_logp: FloatArray  # [N]
    ref_logp: FloatArray | None  # [N], where a KL term is part of the loss

    @staticmethod
    def from_groups(
        groups: Sequence[Group],
        advantages: NDArray[np.floating],
        old_logp: FloatArray,
        ref_logp: FloatArray | None = None,
    ) -> MiniBatch:
        """The groups' samples in order, as in `SequenceBatch.from_groups`.

        Raises:
            ValueError: `advantages` is not [S], or a log-prob array is not [N].
        """
        sequences = SequenceBatch.from_groups(groups)
        tokens = int(sequences.response_lengths.sum())
        for name, values, wanted in [
            ("advantages", advantages, len(sequences)),
            ("old_logp", old_logp, tokens),
            ("ref_logp", ref_logp, tokens),
        ]:
            if values is not None and values.shape != (wanted,):
                raise ValueError(
                    f"{name} has shape {values.shape} for {len(sequences)} sequences with {tokens} response tokens; "
                    f"it must be ({wanted},), in the order of the groups' samples"
                )
        return MiniBatch(
            sequences=sequences,
            group_ids=np.array([g.draw_index for g in groups for _ in g.samples], np.int64),
            truncated=np.array([s.completion.finish_reason == "length" for g in groups for s in g.samples], np.bool_),
            advantages=advantages,
            old_logp=old_logp,
            ref_logp=ref_logp,
        )


@dataclass(frozen=True)
class LossWeighting:
    """How token losses are summed: see `algo.aggregation`."""

    agg_mode: LossAggMode
    scale: LossScale
    overlong_filtering: bool  # truncated responses weigh nothing


@dataclass(frozen=True)
class Update:
    """One optimizer update's work, and how much of the mini-batch counts in it."""

    ranks: tuple[tuple[MicroBatch, ...], ...]  # [data-parallel rank][micro-batch], as many on each rank
    tokens: int  # response tokens that count; with 0 every gradient is 0
    truncated_sequences: int  # left out by overlong filtering
    nonfinite_tokens: int  # left out because their old or reference log-prob is not finite


def build_update(batch: MiniBatch, plan: Plan, weighting: LossWeighting) -> Update:
    """The micro-batches of `plan`, each token with its weight: their weighted losses sum to the mini-batch's loss.

    A token whose old or reference log-prob is not finite gets weight 0 before denominators are taken, and log-prob 0,
    so that no NaN spreads. A micro-batch that the plan leaves empty gets the last prompt and the first response token
    of the shortest sequence, with weight 0: every rank then runs as many passes.

    Raises:
        ValueError: `plan` does not hold each sequence exactly once.
    """
    sequences = batch.sequences
    layout = _layout(plan, len(sequences))
    sequence_N = np.repeat(np.arange(len(sequences)), sequences.response_lengths)
    finite_N = np.isfinite(batch.old_logp)
    if batch.ref_logp is not None:
        finite_N &= np.isfinite(batch.ref_logp)
    filtered_S = batch.truncated & weighting.overlong_filtering
    counts_N = finite_N & ~filtered_S[sequence_N]
    counts_S = np.bincount(sequence_N[counts_N], minlength=len(sequences))
    weight_S = sequence_weights(weighting.agg_mode, weighting.scale, counts_S, batch.group_ids, layout=layout)
    terms = TokenTerms(
        weight=np.where(counts_N, weight_S[sequence_N], 0).astype(np.float32),
        advantage=batch.advantages[sequence_N].astype(np.float32),
        old_logp=np.where(finite_N, batch.old_logp, 0).astype(np.float32),
        ref_logp=None if batch.ref_logp is None else np.where(finite_N, batch.ref_logp, 0).astype(np.float32),
        rollout_logp=None,
    )
    return Update(
        ranks=tuple(tuple(_micro_batch(sequences, terms, indices) for indices in rank) for rank in plan),
        tokens=int(counts_N.sum()),
        truncated_sequences=int(filtered_S.sum()),
        nonfinite_tokens=int((~finite_N).sum()),
    )


def _layout(plan: Plan, sequences: int) -> SequenceLayout:
    places = sorted((s, r, m) for r, rank in enumerate(plan) for m, held in enumerate(rank) for s in held)
    if [s for s, _, _ in places] != list(range(sequences)):
        raise ValueError(
            f"the plan places {len(places)} sequences, {len({s for s, _, _ in places})} of them distinct, and the "
            f"mini-batch has {sequences}; make the plan from this mini-batch's lengths"
        )
    dp_rank, micro_batch = np.array(places, np.int64)[:, 1:].T
    return SequenceLayout(dp_rank, micro_batch, len(plan))


def _micro_batch(sequences: SequenceBatch, terms: TokenTerms, indices: Sequence[int]) -> MicroBatch:
    if not indices:
        return _filler(sequences, terms)
    return MicroBatch(sequences.select(indices), terms.select(sequences.cu_responses, indices))


def _filler(sequences: SequenceBatch, terms: TokenTerms) -> MicroBatch:
    whole = np.flatnonzero((sequences.prompt_lengths > 0) & (sequences.response_lengths > 0))
    if not len(whole):
        raise ValueError("no sequence of the mini-batch has a prompt and a response token; nothing can be trained on")
    shortest = whole[sequences.lengths[whole].argmin()]
    middle = int(sequences.cu_seqlens[shortest] + sequences.prompt_lengths[shortest])
    zero_N = np.zeros(1, np.float32)
    return MicroBatch(
        SequenceBatch(sequences.token_ids[middle - 1 : middle + 1], np.array([2]), np.array([1])),
        TokenTerms(
            weight=zero_N,
            advantage=zero_N,
            old_logp=None if terms.old_logp is None else zero_N,
            ref_logp=None if terms.ref_logp is None else zero_N,
            rollout_logp=None if terms.rollout_logp is None else zero_N,
        ),
    )
