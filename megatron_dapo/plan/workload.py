"""What a rollout meets: how long responses are, and which groups teach something.

Response lengths are log-normal and cut at the limit; a part of their variance is the prompt's, so that a group is long
or short together. Prompts' pass rates follow a beta distribution. Left out: that wrong answers tend to be longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.obs.jsonl import read_records


@dataclass(frozen=True)
class Groups:
    """P prompts drawn, n responses each."""

    lengths: NDArray[np.int64]  # [P, n] tokens
    kept: NDArray[np.bool_]  # [P] the group would pass the filter
    prompts: NDArray[np.int64]  # [P] tokens


@dataclass(frozen=True)
class Workload:
    mean: float  # of a response, tokens, after the cut
    sigma: float  # standard deviation of log-lengths
    between: float  # share of that variance between prompts
    limit: int  # tokens
    prompt: int  # tokens
    kept_share: float  # of groups that the filter keeps; 1 without filter
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.mean < self.limit:
            raise ConfigError(f"a mean response of {self.mean} tokens: wanted from 1 to below the limit, {self.limit}")
        if not (0 < self.kept_share <= 1 and 0 <= self.between <= 1):
            raise ConfigError(f"kept_share is {self.kept_share}, between {self.between}: wanted shares, the first > 0")

    def draw(self, count: int, rng: np.random.Generator) -> Groups:
        mu = location(self.mean, self.sigma, self.limit)
        prompt = rng.normal(size=(count, 1)) * math.sqrt(self.between)
        own = rng.normal(size=(count, self.n)) * math.sqrt(1 - self.between)
        lengths = np.exp(mu + self.sigma * (prompt + own)).clip(1, self.limit).astype(np.int64)
        return Groups(lengths, rng.random(count) < self.kept_share, np.full(count, self.prompt))


def kept_share(pass_rate: float, concentration: float, n: int) -> float:
    """Groups of n in which some are right and some wrong, where pass rates are beta distributed.

    1 - E[p^n] - E[(1-p)^n]; E[p^n] of a beta(a, b) is the product of (a+i)/(a+b+i) for i below n.
    """

    def all_pass(a: float, b: float) -> float:
        return math.prod((a + i) / (a + b + i) for i in range(n))

    a, b = pass_rate * concentration, (1 - pass_rate) * concentration
    return 1 - all_pass(a, b) - all_pass(b, a)


def cut_mean(mu: float, sigma: float, limit: float) -> float:
    """Mean of min(X, limit) where log X is normal."""
    if sigma == 0:
        return min(math.exp(mu), limit)
    normal, at = NormalDist(), (math.log(limit) - mu) / sigma
    return math.exp(mu + sigma * sigma / 2) * normal.cdf(at - sigma) + limit * (1 - normal.cdf(at))


def location(mean: float, sigma: float, limit: float) -> float:
    """The mu at which `cut_mean` is `mean`, by bisection."""
    low, high = math.log(mean) - sigma * sigma, math.log(limit) + 40 * max(sigma, 0.01)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle, sigma, limit) < mean else (low, middle)
    return (low + high) / 2


def fit(samples: str | Path, limit: int, n: int) -> Workload:
    """From a run's `samples.jsonl` (its last quarter of steps), and the `metrics.jsonl` beside it.

    Lengths and their spread come from the samples, which are of kept groups; prompts' lengths are not in them, and are
    counted as 0. The kept share is the mean of `sampling/kept_share` over those steps.

    Raises:
        ConfigError: no such file, or too little in it.
    """
    path = Path(samples)
    rows = _rows(path)
    last = max((row["step"] for row in rows), default=0)
    first = min((row["step"] for row in rows), default=0)
    since = last - (last - first) // 4
    groups: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        if row["step"] >= since:
            groups.setdefault((row["step"], row["draw_index"]), []).append(max(1, row["length"]))
    whole = [np.log(lengths) for lengths in groups.values() if len(lengths) > 1]
    if len(whole) < 2:
        raise ConfigError(f"{path} has {len(whole)} groups of 2 responses or more in its last steps: wanted at least 2")
    logs = np.concatenate(whole)
    within = sum(((group - group.mean()) ** 2).sum() for group in whole) / (len(logs) - len(whole))
    total = max(float(logs.var(ddof=1)), 1e-12)
    mean = float(np.mean([length for lengths in groups.values() for length in lengths]))
    kept = _kept(path.with_name("metrics.jsonl"), since)
    return Workload(
        mean=min(mean, limit - 1e-6),
        sigma=math.sqrt(total),
        between=float(np.clip(1 - within / total, 0, 1)),
        limit=limit,
        prompt=0,
        kept_share=kept,
        n=n,
    )


def _kept(metrics: Path, since: int) -> float:
    if not metrics.exists():
        raise ConfigError(
            f"{metrics} is not there: wanted beside samples.jsonl, for the share of groups that were kept"
        )
    shares = [
        row["sampling/kept_share"] for row in _rows(metrics) if row["step"] >= since and "sampling/kept_share" in row
    ]
    return float(np.mean(shares)) if shares else 1.0


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_records(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; wanted a run's {path.name}") from error
