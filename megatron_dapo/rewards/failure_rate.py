"""When so many responses could not be scored that a run must stop and say so.

Below the limit a failed response is left out of its group; what that means for the group is `data/`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_dapo.types import RewardResult

DETAILS_SHOWN = 3


class RewardFailureRateError(RuntimeError):
    """Above reward_model.max_failure_rate. The message has the numbers, what went wrong most, and what to change."""


class FailureTally:
    """The scored and the failed responses of one training step."""

    def __init__(self) -> None:
        self.total = 0
        self.details: Counter[str] = Counter()

    @property
    def failed(self) -> int:
        return self.details.total()

    def add(self, results: Iterable[RewardResult]) -> None:
        for result in results:
            self.total += 1
            if not result.usable:
                self.details[f"{result.status}: {result.detail}"] += 1

    def check(self, max_failure_rate: float) -> None:
        """
        Raises:
            RewardFailureRateError: more than this share failed.
        """
        if self.failed <= max_failure_rate * self.total:
            return
        most_often = [f"  {count} x {detail}" for detail, count in self.details.most_common(DETAILS_SHOWN)]
        raise RewardFailureRateError(
            "\n".join(
                (
                    f"{self.failed} of {self.total} responses of this step could not be scored: "
                    f"{self.failed / self.total:.1%}, and reward_model.max_failure_rate allows {max_failure_rate:.1%}. "
                    f"The most frequent of {len(self.details)} causes:",
                    *most_often,
                    "Mend the reward function; for timeouts raise reward_model.timeout or num_workers; to train on "
                    "the rest all the same raise reward_model.max_failure_rate.",
                )
            )
        )
