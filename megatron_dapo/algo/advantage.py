"""The group advantage: how much better a response was than the other responses to its prompt.

No baseline network and no discount: one number a response, the same for all its tokens.
Source: DAPO, arXiv 2503.14476, eq. 9; the sample deviation (ddof = 1), the epsilon and the group of one are the
public recipe's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILON = 1e-6


def group_advantages(rewards: ArrayLike, group_ids: ArrayLike) -> NDArray[np.float64]:
    """(R - mean of its group) / (std of its group + 1e-6), [S] in float64; a group of one has mean 0 and std 1.

    Args:
        rewards: [S], the shaped rewards.
        group_ids: [S] integers; sequences with one id are a group, of any size and anywhere in the batch.

    Raises:
        ValueError: the two differ in length.
    """
    rewards_S = np.asarray(rewards, np.float64)
    ids_S = np.asarray(group_ids)
    if rewards_S.shape != ids_S.shape or rewards_S.ndim != 1:
        raise ValueError(f"rewards of shape {rewards_S.shape} and group_ids of shape {ids_S.shape}; both must be [S]")
    _, group_S = np.unique(ids_S, return_inverse=True)
    size_P = np.bincount(group_S)
    alone_P = size_P == 1

    mean_P = np.where(alone_P, 0.0, np.bincount(group_S, weights=rewards_S) / size_P)
    centred_S = rewards_S - mean_P[group_S]
    variance_P = np.bincount(group_S, weights=centred_S**2) / np.maximum(size_P - 1, 1)
    std_P = np.where(alone_P, 1.0, np.sqrt(variance_P))
    return centred_S / (std_P[group_S] + EPSILON)
