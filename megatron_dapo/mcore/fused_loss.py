"""From hidden states to the DAPO loss and its gradient in one pass, over a vocabulary that tensor parallelism splits.

For each chunk of tokens: logits on the local vocabulary shard; one all-gather of four statistics a token (max, sum of
exponentials, target logit, sum of probability x logit); log-prob, entropy, the loss and its derivative; the gradient
with respect to hidden states and weight at once. Logits live for one chunk and are never kept or computed again.

Axes: `n` tokens, `c` tokens of a chunk, `h` hidden size, `v` rows of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dapo.algo.kl import kl_penalty
from megatron_dapo.algo.loss import PolicyLossConfig, policy_loss
from megatron_dapo.config.tree import KLPenalty
from megatron_dapo.mcore.batch import HeadTerms

LOGITS_BYTES = 64 * 2**20
_ROWS = 4  # statistics a token
_PADDING = -1e30  # the logit of a padded row: its exponential is 0, and a sum of such logits is still finite


@dataclass(frozen=True)
class Objective:
    """What is summed over tokens: weight x (policy loss + KL coefficient x KL - entropy coefficient x entropy)."""

    clip: PolicyLossConfig
    temperature: float
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KLPenalty = "low_var_kl"


@dataclass(frozen=True)
class Vocabulary:
    """How the vocabulary lies over tensor parallelism: `size` real rows, padding behind them."""

    size: int
    group: dist.ProcessGroup
    logits_bytes: int = LOGITS_BYTES  # what the fp32 logits of one chunk may take on a rank


# Sums over the tokens of a micro-batch; the order of the vector that `dapo_loss` returns.
SUMS = (
    "tokens",
    "loss",
    "policy_loss",
    "kl_loss",
    "entropy",
    "approx_kl",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "clamped",
    "ratio",
)


@dataclass(frozen=True)
class HeadResult:
    loss: torch.Tensor  # []
    sums: torch.Tensor  # [len(SUMS)] float64, detached
    logp: torch.Tensor  # [n] float32, detached
    entropy: torch.Tensor  # [n] float32, detached


def dapo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    terms: HeadTerms,
    objective: Objective,
    vocabulary: Vocabulary,
) -> HeadResult:
    """hidden [n,h], weight [v,h], targets [n] -> the weighted sum of the loss, differentiable in hidden and weight.

    The gradient with respect to `hidden` is this rank's share of the vocabulary: the caller sums it over tensor
    parallelism (all-reduce, or reduce-scatter under sequence parallelism).
    """
    loss, sums, logp, entropy = _OnePass.apply(hidden, weight, targets, terms, objective, vocabulary)  # type: ignore[misc]
    return HeadResult(loss, sums, logp, entropy)


def token_logp(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of its distribution, [n] each, float32; no gradient, no logits kept."""
    logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(logp)
    with torch.no_grad():
        for part in _chunks(len(hidden), weight.size(0), vocabulary.logits_bytes):
            chunk = _Chunk(hidden[part], weight, targets[part], temperature, vocabulary)
            logp[part], entropy[part] = chunk.logp, chunk.entropy
    return logp, entropy


class _Chunk:
    """The softmax of one chunk of tokens over the whole vocabulary, of which this rank holds `probs` [c,v]."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        vocabulary: Vocabulary,
    ):
        rows = weight.size(0)
        first = vocabulary.group.rank() * rows
        logits = (hidden @ weight.T).float()
        if temperature != 1.0:
            logits /= temperature
        padding = max(0, first + rows - vocabulary.size)
        if padding:
            logits[:, rows - min(padding, rows) :] = _PADDING
        local = targets - first
        self.owned = (local >= 0) & (local < rows)
        self.column = local.clamp(0, rows - 1)
        target_logit = logits.gather(1, self.column[:, None])[:, 0] * self.owned
        local_max = logits.amax(1)
        probs = (logits - local_max[:, None]).exp_()
        stats = torch.stack([local_max, probs.sum(1), target_logit, (probs * logits).sum(1)])
        maximum, total, target, weighted = _combine(stats, vocabulary.group)
        self.logits = logits
        self.log_total = maximum + total.log()
        self.probs = probs.mul_(((local_max - maximum).exp() / total)[:, None])
        self.logp = target - self.log_total
        self.entropy = self.log_total - weighted / total


def _combine(stats: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """[4,c] of this rank -> (max, sum of exponentials, target logit, sum of exponential x logit) over all ranks."""
    size = group.size()
    if size == 1:
        return tuple(stats.unbind(0))
    gathered = torch.empty(size * _ROWS, stats.size(1), dtype=stats.dtype, device=stats.device)
    dist.all_gather_into_tensor(gathered, stats, group=group)
    local_max, total, target, weighted = gathered.view(size, _ROWS, -1).unbind(1)
    maximum = local_max.amax(0)
    scale = (local_max - maximum).exp()
    return maximum, (total * scale).sum(0), target.sum(0), (weighted * scale).sum(0)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        terms: HeadTerms,
        objective: Objective,
        vocabulary: Vocabulary,
    ) -> tuple[torch.Tensor, ...]:
        train = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.zeros_like(hidden) if train else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if train else None
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logp)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=hidden.device)
        for part in _chunks(len(hidden), weight.size(0), vocabulary.logits_bytes):
            chunk = _Chunk(hidden[part], weight, targets[part], objective.temperature, vocabulary)
            logp[part], entropy[part] = chunk.logp, chunk.entropy
            d_logp, d_entropy = _token_loss(chunk, _slice(terms, part), objective, sums)
            if d_hidden is not None and d_weight is not None:
                d_logits = _d_logits(chunk, d_logp, d_entropy, objective).to(hidden.dtype)
                torch.mm(d_logits, weight, out=d_hidden[part])
                d_weight += d_logits.T @ hidden[part]
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(sums, logp, entropy)
        return sums[SUMS.index("loss")].float(), sums, logp, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, d_weight * d_loss, None, None, None, None


def _token_loss(
    chunk: _Chunk, terms: HeadTerms, objective: Objective, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d loss / d logp and d loss / d entropy of each token [c], weights included; adds the chunk to `sums`."""
    w = terms.weight
    policy = policy_loss(chunk.logp, terms.old_logp, terms.advantage, objective.clip)
    loss, d_logp = policy.loss, policy.grad
    kl = torch.zeros_like(loss)
    if terms.ref_logp is not None:
        kl, d_kl = kl_penalty(chunk.logp, terms.ref_logp, objective.kl_kind)
        loss, d_logp = loss + objective.kl_coef * kl, d_logp + objective.kl_coef * d_kl
    d_entropy = None
    if objective.entropy_coeff:
        loss = loss - objective.entropy_coeff * chunk.entropy
        d_entropy = -objective.entropy_coeff * w
    counted = (w != 0).double()
    rows = (
        counted,
        w * loss,
        w * policy.loss,
        w * kl,
        counted * chunk.entropy,
        counted * (terms.old_logp - chunk.logp),
        counted * policy.clipped_high,
        counted * policy.clipped_low,
        counted * policy.dual_clipped,
        counted * policy.clamped,
        counted * policy.ratio,
    )
    sums += torch.stack([row.double().sum() for row in rows])
    return w * d_logp, d_entropy


def _d_logits(
    chunk: _Chunk, d_logp: torch.Tensor, d_entropy: torch.Tensor | None, objective: Objective
) -> torch.Tensor:
    """[c,v]: d_logp (1[target] - p) - d_entropy p (log p + entropy), through the temperature."""
    if d_entropy is None:
        grad = chunk.probs.mul_(-d_logp[:, None])
    else:
        log_probs = chunk.logits - chunk.log_total[:, None]
        grad = -chunk.probs * (d_logp[:, None] + d_entropy[:, None] * (log_probs + chunk.entropy[:, None]))
    grad.scatter_add_(1, chunk.column[:, None], (d_logp * chunk.owned)[:, None])
    return grad if objective.temperature == 1.0 else grad.div_(objective.temperature)


def _slice(terms: HeadTerms, part: slice) -> HeadTerms:
    ref = terms.ref_logp
    return HeadTerms(
        terms.weight[part], terms.advantage[part], terms.old_logp[part], None if ref is None else ref[part]
    )


def _chunks(tokens: int, rows: int, logits_bytes: int) -> list[slice]:
    size = max(1, logits_bytes // (4 * rows))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
