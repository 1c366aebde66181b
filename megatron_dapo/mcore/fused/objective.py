"""The objective of a token: from its log-prob and entropy to the loss, its slopes and what is counted.

The policy loss and the KL estimators are those of `algo/`. The sequence ratio: GSPO, arXiv 2507.18071, eq. 5 to 7.
Axes: `c` tokens of a chunk, `n` of a micro-batch on this rank, `S` sequences of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dapo.algo.kl import kl_penalty
from megatron_dapo.algo.loss import PolicyLossConfig, policy_loss
from megatron_dapo.config.tree import KLPenalty
from megatron_dapo.mcore.batch import HeadTerms
from megatron_dapo.mcore.fused.softmax import Slopes


@dataclass(frozen=True)
class Objective:
    """What is summed over tokens: weight x (policy loss + KL coefficient x KL - entropy coefficient x entropy).

    `tis_cap`: the policy loss of a token is multiplied by min(old / rollout probability, tis_cap), held constant.
    `ratio`: new over old probability of each token, or of its sequence (the geometric mean over counted tokens).
    """

    clip: PolicyLossConfig
    temperature: float
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KLPenalty = "low_var_kl"
    tis_cap: float | None = None
    ratio: Literal["token", "sequence"] = "token"


# Sums over the tokens of a micro-batch, in the order that `token_objective` returns them: those that hold the
# tokens' weights, then those over the tokens whose weight is not 0.
WEIGHTED_SUMS = ("loss", "policy_loss", "kl_loss")
COUNTED_SUMS = (
    "tokens",
    "entropy",
    "approx_kl",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "clamped",
    "ratio",
    "tis_weight",
    "tis_capped",
)
SUMS = WEIGHTED_SUMS + COUNTED_SUMS


@dataclass(frozen=True)
class SequenceRatio:
    """What a sequence-level ratio needs before any gradient: over all context-parallel ranks, [S] each."""

    log_ratio: Tensor  # mean of logp - old logp over the counted tokens
    share: Tensor  # sum of the policy loss's weights / number of counted tokens: a token's d loss / d logp at slope 1


def sequence_ratio(
    logp: Tensor, terms: HeadTerms, objective: Objective, context: dist.ProcessGroup | None
) -> SequenceRatio:
    """logp [n] of this rank's tokens. Collective over `context`, the context-parallel ranks; None: there is one."""
    old = _old_logp(logp, terms)
    counted = (terms.weight != 0).double()
    tis = _tis(old, terms, objective)
    weight = terms.weight if tis is None else terms.weight * tis.weight
    rows = torch.stack([counted * (logp - old), weight.double(), counted])
    sums = rows.new_zeros(len(rows), terms.num_sequences).index_add_(1, terms.sequence, rows)
    if context is not None and context.size() > 1:
        dist.all_reduce(sums, group=context)
    log_ratio, weight_sum, tokens = sums
    tokens = tokens.clamp(min=1)
    return SequenceRatio((log_ratio / tokens).to(logp.dtype), (weight_sum / tokens).to(logp.dtype))


def token_objective(
    logp: Tensor, entropy: Tensor, terms: HeadTerms, objective: Objective, sequences: SequenceRatio | None
) -> tuple[Slopes, Tensor]:
    """logp and entropy [c] -> slopes of the loss, weights included, and SUMS over the chunk, float64.

    `sequences` is there where the ratio is one of sequences.
    """
    w, old = terms.weight, _old_logp(logp, terms)
    counted, nothing = w != 0, torch.zeros_like(logp)
    tis = _tis(old, terms, objective)
    if sequences is None:
        policy = policy_loss(logp, old, terms.advantage, objective.clip)
        d_logp = (w if tis is None else w * tis.weight) * policy.grad
    else:
        log_ratio = sequences.log_ratio[terms.sequence]
        policy = policy_loss(log_ratio, nothing, terms.advantage, objective.clip)
        d_logp = counted * sequences.share[terms.sequence] * policy.grad
    policy_term = policy.loss if tis is None else policy.loss * tis.weight
    loss, kl, d_entropy = policy_term, nothing, None
    if terms.ref_logp is not None:
        kl, d_kl = kl_penalty(logp, terms.ref_logp, objective.kl_kind)
        loss, d_logp = loss + objective.kl_coef * kl, d_logp + w * (objective.kl_coef * d_kl)
    if objective.entropy_coeff:
        loss = loss - objective.entropy_coeff * entropy
        d_entropy = -objective.entropy_coeff * w
    marks = torch.stack([policy.clipped_high, policy.clipped_low, policy.dual_clipped, policy.clamped]).to(logp.dtype)
    corrected = (nothing, nothing) if tis is None else (tis.weight, tis.capped)
    counts = (torch.ones_like(logp), entropy, old - logp, *marks, policy.ratio, *corrected)
    sums = [_summed((loss, policy_term, kl), w), _summed(counts, counted)]
    return Slopes(d_logp, d_entropy), torch.cat(sums)


@dataclass(frozen=True)
class _Tis:
    weight: Tensor  # [c]
    capped: Tensor  # [c] 1 where the cap bites


def _tis(old: Tensor, terms: HeadTerms, objective: Objective) -> _Tis | None:
    cap, rollout = objective.tis_cap, terms.rollout_logp
    if cap is None:
        return None
    if rollout is None:
        raise ValueError(f"tis_cap is {cap} and the batch has no rollout_logp; hand the engine's log-probs in")
    weight = (old - rollout).exp()
    return _Tis(weight.clamp(max=cap), (weight > cap).to(old.dtype))


def _old_logp(logp: Tensor, terms: HeadTerms) -> Tensor:
    return logp if terms.old_logp is None else terms.old_logp


def _summed(rows: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    return torch.stack(rows).double() @ weight.double()
