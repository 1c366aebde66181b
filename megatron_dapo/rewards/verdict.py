"""What a verifier's return value means: a score with its numbers, no answer found, or an error.

A worker's side of `RewardResult`, without numpy, so that a worker starts in milliseconds.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat

from megatron_dapo.rewards.math_dapo import NO_ANSWER

if TYPE_CHECKING:
    from megatron_dapo.types import RewardStatus

TEXT_LIMIT = 1000  # characters of a prediction or detail: they are kept for every sample of a step


class Verdict(NamedTuple):
    """The fields of `RewardResult`, in its order."""

    status: RewardStatus
    score: float
    metrics: dict[str, float]
    pred: str = ""
    detail: str = ""


def failure(status: RewardStatus, detail: str) -> Verdict:
    """`status` is "timeout" or "error"."""
    return Verdict(status, math.nan, {}, detail=detail[:TEXT_LIMIT])


def from_exception(error: BaseException) -> Verdict:
    """What was raised and where, on one line."""
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return failure("error", what[: TEXT_LIMIT - len(where)] + where)


def read(returned: object) -> Verdict:
    """The verdict in a verifier's return value: a number, or a mapping with `score`.

    `acc` is score > 0 where the mapping has none. Every other number of the mapping is kept as a metric, a bool as 0
    or 1, what is no number is not; `pred` becomes text. A number that is NaN or infinite is an error.
    """
    fields = returned if isinstance(returned, Mapping) else {"score": returned}
    numbers = {str(key): _number(value) for key, value in fields.items() if key != "pred"}
    score = numbers.get("score")
    if score is None:
        return failure("error", f"the verifier returned {returned!r}; want a number, or a dict with a number 'score'")
    if "acc" in numbers and numbers["acc"] is None:
        return failure("error", f"the verifier returned acc = {fields['acc']!r}; want a bool or a number, or no 'acc'")
    metrics = {"acc": float(score > 0), **{key: value for key, value in numbers.items() if value is not None}}
    unfit = {key: value for key, value in metrics.items() if not math.isfinite(value)}
    if unfit:
        return failure("error", f"the verifier returned {unfit}; want finite numbers")
    pred = fields.get("pred")
    text = "" if pred is None else str(pred)[:TEXT_LIMIT]
    return Verdict("unparsable" if text == NO_ANSWER else "ok", score, metrics, text)


def _number(value: object) -> float | None:
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, SupportsFloat):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # an array of several numbers, an integer past any float
        return None
