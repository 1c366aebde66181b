"""DAPO's policy loss for each token: clip-higher and dual clip, with its gradient in closed form.

Element-wise alone: how tokens are weighted into one number is `aggregation.py`'s, and the gradient is there so that
a kernel that never builds a graph can use it.
Sources: DAPO, arXiv 2503.14476, eq. 8; dual clip, arXiv 1912.09729, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: past it a ratio says nothing, and further on exp overflows


@dataclass(frozen=True)
class PolicyLossConfig:
    """The ratio is clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; `clip_ratio_c` bounds it where A < 0."""

    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float

    def __post_init__(self) -> None:
        if not 0 <= self.clip_ratio_low <= 1:
            raise ValueError(f"clip_ratio_low is {self.clip_ratio_low}; it must lie in [0, 1], as 0.2 does")
        if self.clip_ratio_high < 0:
            raise ValueError(f"clip_ratio_high is {self.clip_ratio_high}; it must be 0 or more, as 0.28 is")
        if self.clip_ratio_c <= 1:
            raise ValueError(f"clip_ratio_c is {self.clip_ratio_c}; it must be above 1, as 10 is")


@dataclass(frozen=True)
class PolicyLoss:
    """What the loss says of each token. All tensors have the shape and device of the log-probs."""

    loss: Tensor
    grad: Tensor  # d loss / d logp
    ratio: Tensor  # exp(logp - old_logp), after the clamp
    clipped_high: Tensor  # bool: A > 0 and the ratio is above its band, so that the token teaches nothing
    clipped_low: Tensor  # bool: A < 0 and the ratio is below its band, likewise
    dual_clipped: Tensor  # bool: A < 0 and the ratio is above clip_ratio_c, likewise
    clamped: Tensor  # bool: |logp - old_logp| is above LOG_RATIO_LIMIT


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, config: PolicyLossConfig) -> PolicyLoss:
    """max(-A r, -A clip(r)), and where A < 0 at most -A c; r = exp(logp - old_logp).

    Any shape, the same for all three; any floating type, which is kept. Nothing is written in place and nothing
    waits for the device. Where two branches are equal `grad` is the mean of their slopes, as torch has it.
    A NaN log-prob gives a NaN loss: weight 0 does not hide it, so replace such values before.
    """
    log_ratio = logp - old_logp
    clamped = log_ratio.abs() > LOG_RATIO_LIMIT
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    clipped = bounded > free
    clipped_loss = torch.maximum(free, bounded)

    ceiling = -advantage * config.clip_ratio_c
    negative = advantage < 0
    dual_clipped = negative & (clipped_loss > ceiling)
    at_ceiling = negative & (clipped_loss == ceiling)

    # The slope of -A r with respect to logp is -A r itself; every bound that bites makes it 0.
    slope = torch.where(at_ceiling, free / 2, free)
    return PolicyLoss(
        loss=torch.where(dual_clipped, ceiling, clipped_loss),
        grad=slope.masked_fill(clipped | dual_clipped | clamped, 0.0),
        ratio=ratio,
        clipped_high=clipped & ~negative,
        clipped_low=clipped & negative,
        dual_clipped=dual_clipped,
        clamped=clamped,
    )
