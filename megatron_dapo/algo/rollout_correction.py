"""Masked importance sampling: which sequences the trainer's old policy and the engine disagree about too much.

Truncated importance sampling, the other correction, is a factor of each token's loss and lives with the objective.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def outside_band(
    log_ratio_N: NDArray[np.floating],
    sequence_N: NDArray[np.integer],
    sequences: int,
    low: float | None,
    high: float | None,
) -> NDArray[np.bool_]:
    """[S] whether the geometric mean of a sequence's old / rollout probability ratios is below `low` or above `high`.

    The mean over tokens, not their product: that of a long response leaves any band. A bound of None bounds nothing;
    tokens whose log-ratio is not finite are left out of the mean, and a sequence of nothing else is inside.

    Args:
        log_ratio_N: [N] old log-prob minus the engine's, in nats.
        sequence_N: [N] which of the `sequences` each token belongs to.
    """
    finite_N = np.isfinite(log_ratio_N)
    sums_S = np.bincount(sequence_N[finite_N], log_ratio_N[finite_N].astype(np.float64), sequences)
    mean_S = sums_S / np.maximum(np.bincount(sequence_N[finite_N], minlength=sequences), 1)
    below = -math.inf if not low else math.log(low)
    above = math.inf if high is None else math.log(high)
    return (mean_S < below) | (mean_S > above)
