"""What an evaluation says of a policy: avg@k, pass@k and cons@k, each with a 95 % confidence interval.

The sampling unit is the problem, not the response: responses to one problem go right or wrong together, and
an interval over responses would be several times too narrow.
Sources: pass@k, Chen et al. 2021, arXiv 2107.03374, eq. 1; cons@k, Wang et al. 2022, arXiv 2203.11171; the interval,
Wilson 1927 with the effective sample size of a clustered sample (Kish 1965).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and the interval that holds the true one with 95 % confidence; all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimates:
    """`k` is the number of responses a problem, the smallest where they differ."""

    problems: int
    k: int
    avg: Estimate  # avg@k: the share of right responses
    pass_at: Mapping[int, Estimate]  # for 1, 2, 4, ... and k: at least one of so many responses is right
    cons: Estimate  # cons@k: the most frequent prediction is right


def evaluate_problem_set(correct: Sequence[NDArray[np.bool_]], preds: Sequence[Sequence[str]]) -> Estimates:
    """The estimates over a set of problems.

    avg@k and cons@k use all the responses of a problem, pass@k too, by its unbiased estimator.

    Args:
        correct: for each problem, [k] whether each response is right; k may differ between problems.
        preds: for each problem, the k predictions.

    Raises:
        ValueError: no problem, a problem without a response, or lengths that differ.
    """
    _check(correct, preds)
    k_max = min(len(right) for right in correct)
    ks = sorted({2**i for i in range(k_max.bit_length())} | {k_max})
    counts = [(len(right), int(np.sum(right))) for right in correct]
    return Estimates(
        problems=len(correct),
        k=k_max,
        avg=mean_over_problems([c / n for n, c in counts]),
        pass_at={k: mean_over_problems([pass_at_k(n, c, k) for n, c in counts]) for k in ks},
        cons=mean_over_problems([consensus(r, p) for r, p in zip(correct, preds, strict=True)]),
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k responses drawn without replacement from n, of which c are right, hold a right one.

    1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: k above n, or c above n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} from {n} responses of which {c} are right; k must lie in 1..n and c in 0..n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def consensus(correct: NDArray[np.bool_], preds: Sequence[str]) -> float:
    """The chance that the majority vote is right: 0 or 1, or between where predictions tie for the first place.

    A tie is broken by a fair draw, so its expected value is the share of right ones among the tied predictions.
    A missing answer votes like any other prediction. Where one prediction was judged both ways, its share counts.
    """
    votes = Counter(preds)
    most = max(votes.values())
    winners = {pred for pred, count in votes.items() if count == most}
    return float(np.mean([right for right, pred in zip(correct, preds, strict=True) if pred in winners]))


def mean_over_problems(values: Sequence[float]) -> Estimate:
    """The mean of one value in [0, 1] a problem, with Wilson's 95 % interval.

    Wilson's interval for a share p of m trials, with m = p (1 - p) / (variance of the mean), the number of
    independent trials that would be as uncertain. For values of 0 and 1 this is the ordinary interval to within one
    trial; where all problems agree, m is their number. It stays in [0, 1], and has a width even where all are wrong.
    """
    values_P = np.asarray(values, np.float64)
    problems, p = len(values_P), float(values_P.mean())
    variance = float(values_P.var(ddof=1)) if problems > 1 else 0.0
    spread = p * (1 - p)
    m = problems * spread / variance if variance > 0 and spread > 0 else problems
    centre = (p + Z_95**2 / (2 * m)) / (1 + Z_95**2 / m)
    half = Z_95 / (1 + Z_95**2 / m) * math.sqrt(spread / m + Z_95**2 / (4 * m**2))
    return Estimate(value=p, low=max(centre - half, 0.0), high=min(centre + half, 1.0))


def _check(correct: Sequence[NDArray[np.bool_]], preds: Sequence[Sequence[str]]) -> None:
    if not correct or len(correct) != len(preds):
        raise ValueError(f"{len(correct)} problems with {len(preds)} lists of predictions; need the same, 1 or more")
    for index, (right, answers) in enumerate(zip(correct, preds, strict=True)):
        if len(right) == 0 or len(right) != len(answers):
            raise ValueError(
                f"problem {index} has {len(right)} judged responses and {len(answers)} predictions; "
                "need the same number, 1 or more; leave out a problem whose responses could not be scored"
            )
