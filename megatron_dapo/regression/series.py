"""A curve over gradient updates: smoothed, its jitter, where it gets to a level. Axes: `P` points, `X` places asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BANDWIDTH = 120.0  # updates: standard deviation of the kernel; the paper's evaluations are 80 apart


@dataclass(frozen=True)
class Series:
    """Values at rising numbers of gradient updates; every one finite."""

    updates: Floats  # [P]
    values: Floats  # [P]

    def __post_init__(self) -> None:
        if self.updates.shape != self.values.shape or self.updates.ndim != 1 or not len(self.updates):
            raise ValueError(
                f"a series of {self.updates.shape} updates and {self.values.shape} values; wanted as many of one as of "
                "the other, and at least one"
            )
        if not (np.isfinite(self.values).all() and (np.diff(self.updates) > 0).all()):
            raise ValueError("a series has values that are not finite, or updates that do not rise; leave those out")

    def smoothed(self, at_X: Floats) -> Floats:
        """[X] the local straight line through the points, weighted by a Gaussian of their distance.

        A line and not a mean: it does not pull down the ends of a rising curve.
        """
        distance_XP = self.updates[None, :] - at_X[:, None]
        # Far from every point all weights would be 0: only the distance beyond the nearest point's counts.
        exponent_XP = 0.5 * (distance_XP / BANDWIDTH) ** 2
        weight_XP = np.exp(exponent_XP.min(axis=1, keepdims=True) - exponent_XP)
        weight_XP /= weight_XP.sum(axis=1, keepdims=True)
        centre_X = (weight_XP * distance_XP).sum(axis=1)
        mean_X = weight_XP @ self.values
        off_XP = distance_XP - centre_X[:, None]
        variance_X = (weight_XP * off_XP**2).sum(axis=1)
        slope_X = (weight_XP * off_XP) @ self.values / np.where(variance_X > 1.0, variance_X, np.inf)
        return mean_X - slope_X * centre_X

    def jitter(self) -> float:
        """Standard deviation of a point around the curve: root mean square of second differences over sqrt(6).

        Three points on a straight line with independent errors of variance 1 have a second difference of variance 6
        (Gasser, Sroka and Jennen-Steinmetz 1986, for equal distances). A slow drift does not count.

        Raises:
            ValueError: fewer than three points.
        """
        if len(self.values) < 3:
            raise ValueError(f"the jitter of {len(self.values)} points was asked for; three at least have one")
        return float(np.sqrt(np.mean(np.diff(self.values, n=2) ** 2) / 6))

    def log(self) -> Series:
        return Series(self.updates, np.log(self.values))


def first_at(updates_X: Floats, values_X: Floats, level: float) -> float | None:
    """The first place from which on a curve stands at or above `level`; None: it never does."""
    places = np.flatnonzero(values_X >= level)
    return float(updates_X[places[0]]) if len(places) else None
