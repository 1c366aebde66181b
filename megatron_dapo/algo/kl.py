"""The four estimators of KL(policy || reference) for each token, each with its gradient in closed form.

For the KL in the loss the gradient is used, for the KL in the reward the value alone. How tokens are weighted is
`aggregation.py`'s. Source: J. Schulman, "Approximating KL Divergence", 2020, whose k1, k2 and k3 are `kl`, `mse`
and `low_var_kl`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dapo.config.tree import KLPenalty

LOG_RATIO_LIMIT = 20.0
LOW_VAR_LIMIT = 10.0


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: KLPenalty) -> tuple[Tensor, Tensor]:
    """(value, d value / d logp) of the estimator `kind`, element-wise, in the type of the log-probs."""
    return KL_ESTIMATORS[kind](logp, ref_logp)


def _kl(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    return logp - ref_logp, torch.ones_like(logp)


def _abs(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    difference = logp - ref_logp
    return difference.abs(), difference.sign()


def _mse(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    difference = logp - ref_logp
    return difference.square() / 2, difference


def _low_var_kl(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """exp(d) - d - 1 with d = ref_logp - logp, at most LOW_VAR_LIMIT; it is never negative."""
    # Past |d| = 20 the value is at its limit whatever d is: the clamp keeps exp finite and changes nothing else.
    difference = (ref_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    growth = torch.expm1(difference)
    value = growth - difference
    return value.clamp(max=LOW_VAR_LIMIT), (-growth).masked_fill(value > LOW_VAR_LIMIT, 0.0)


KL_ESTIMATORS: dict[KLPenalty, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "kl": _kl,
    "abs": _abs,
    "mse": _mse,
    "low_var_kl": _low_var_kl,
}
