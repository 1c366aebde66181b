"""Mini-batches of whole groups, and the micro-batches that one optimizer update trains on.

Which sequence goes where is decided in `packing.py`, what a token weighs in `algo/aggregation.py`; here the two
meet. Axes: `S` sequences of the mini-batch, `N` its response tokens back to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_dapo.algo.aggregation import SequenceLayout, sequence_weights
from megatron_dapo.algo.rollout_correction import outside_band
from megatron_dapo.config.tree import LossAggMode, LossScale, RolloutCorrectionConfig
from megatron_dapo.data.packing import Plan
from megatron_dapo.types import (
    FloatArray,
    Group,
    IntArray,
    MicroBatch,
    PlannedMicroBatch,
    SequenceRows,
    TokenTerms,
    nonfinite_tokens,
)


def mini_batches(groups: Sequence[Group], groups_per_mini_batch: int) -> list[tuple[Group, ...]]:
    """Whole groups, cut in the order given. What is left over makes a last, smaller mini-batch."""
    return [
        tuple(groups[start : start + groups_per_mini_batch]) for start in range(0, len(groups), groups_per_mini_batch)
    ]


@dataclass(frozen=True)
class MiniBatch:
    """S sequences and what the loss needs of them, before it is known where each is computed."""

    sequences: SequenceRows
    group_ids: IntArray  # [S]
    truncated: NDArray[np.bool_]  # [S] ended by the length limit
    advantages: NDArray[np.floating]  # [S]
    old_logp: FloatArray | None  # [N]; None: the mini-batch is its own old policy
    ref_logp: FloatArray | None  # [N], where a KL term is part of the loss
    rollout_logp: Sequence[FloatArray]  # [S] of [R] the engine's

    @staticmethod
    def from_groups(
        groups: Sequence[Group],
        advantages: NDArray[np.floating],
        old_logp: FloatArray | None,
        ref_logp: FloatArray | None = None,
    ) -> MiniBatch:
        """The groups' samples in order, as in `SequenceRows.from_groups`.

        Raises:
            ValueError: `advantages` is not [S], or a log-prob array is not [N].
        """
        sequences = SequenceRows.from_groups(groups)
        tokens = int(sequences.cu_responses[-1])
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
            rollout_logp=[s.completion.logprobs for g in groups for s in g.samples],
        )


@dataclass(frozen=True)
class LossWeighting:
    """How token losses are summed: see `algo.aggregation`."""

    agg_mode: LossAggMode
    scale: LossScale
    overlong_filtering: bool  # truncated responses weigh nothing
    correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)


@dataclass(frozen=True)
class Update:
    """One optimizer update's work, and how much of the mini-batch counts in it."""

    # [data-parallel rank][micro-batch], as many on each rank
    ranks: tuple[tuple[MicroBatch | PlannedMicroBatch, ...], ...]
    plan: Plan  # which sequences of the mini-batch these hold
    cu_responses: IntArray  # [S+1] where each response of the mini-batch starts among its tokens
    tokens: int  # response tokens that count; with 0 every gradient is 0
    truncated_sequences: int  # left out by overlong filtering
    masked_sequences: int  # left out because engine and trainer differ too much about them
    nonfinite_tokens: int  # left out because one of their log-probs is not finite


def build_update(batch: MiniBatch, plan: Plan, weighting: LossWeighting) -> Update:
    """The micro-batches of `plan`, each token with its weight: their weighted losses sum to the mini-batch's loss.

    A token with a log-prob that is used and not finite is in no denominator, and weighs nothing (see `TokenTerms`); so
    it is with all tokens of a sequence that is filtered or masked. A micro-batch that the plan leaves empty gets the
    last prompt and the first response token of the shortest sequence, with weight 0: every rank then runs as many
    passes.

    Raises:
        ValueError: `plan` does not hold each sequence exactly once.
    """
    sequences = batch.sequences
    lengths_S = sequences.response_lengths
    correction = weighting.correction
    rollout_logp = None if correction.tis_cap is None else np.concatenate(batch.rollout_logp)
    nonfinite = nonfinite_tokens(batch.old_logp, batch.ref_logp, rollout_logp)
    sequence_of_nonfinite = np.searchsorted(sequences.cu_responses, nonfinite, side="right") - 1
    filtered_S = batch.truncated & weighting.overlong_filtering
    masked_S = np.zeros(len(sequences), np.bool_)
    if batch.old_logp is not None and correction.masks:
        sequence_N = np.repeat(np.arange(len(sequences)), lengths_S)
        log_ratio_N = batch.old_logp - np.concatenate(batch.rollout_logp)
        masked_S = outside_band(log_ratio_N, sequence_N, len(sequences), correction.mis_low, correction.mis_high)
    finite_S = lengths_S - np.bincount(sequence_of_nonfinite, minlength=len(sequences))
    counts_S = np.where(filtered_S | masked_S, 0, finite_S)
    layout = _layout(plan, len(sequences))
    weight_S = sequence_weights(weighting.agg_mode, weighting.scale, counts_S, batch.group_ids, layout=layout)
    terms = TokenTerms(
        weight=np.where(counts_S > 0, weight_S, 0).astype(np.float32),
        advantage=batch.advantages.astype(np.float32),
        old_logp=batch.old_logp,
        ref_logp=batch.ref_logp,
        rollout_logp=rollout_logp,
    )
    return Update(
        ranks=tuple(tuple(_micro_batch(sequences, terms, indices) for indices in rank) for rank in plan),
        plan=plan,
        cu_responses=sequences.cu_responses,
        tokens=int(counts_S.sum()),
        truncated_sequences=int(filtered_S.sum()),
        masked_sequences=int(masked_S.sum()),
        nonfinite_tokens=len(nonfinite),
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


def _micro_batch(sequences: SequenceRows, terms: TokenTerms, indices: Sequence[int]) -> MicroBatch | PlannedMicroBatch:
    return PlannedMicroBatch(sequences, terms, indices) if indices else _filler(sequences, terms)


def _filler(sequences: SequenceRows, terms: TokenTerms) -> MicroBatch:
    whole = np.flatnonzero((sequences.prompt_lengths > 0) & (sequences.response_lengths > 0))
    if not len(whole):
        raise ValueError("no sequence of the mini-batch has a prompt and a response token; nothing can be trained on")
    shortest = whole[sequences.lengths[whole].argmin()]
    tokens = SequenceRows([sequences.prompts[shortest][-1:]], [sequences.responses[shortest][:1]])
    zero = np.zeros(1, np.float32)
    return MicroBatch(
        tokens.select([0]),
        TokenTerms(
            weight=zero,
            advantage=zero,
            old_logp=None if terms.old_logp is None else zero,
            ref_logp=None if terms.ref_logp is None else zero,
            rollout_logp=None if terms.rollout_logp is None else zero,
        ),
    )
