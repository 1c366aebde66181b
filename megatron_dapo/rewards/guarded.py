"""A reward pool that ends the rollout as soon as too many of a step's responses cannot be scored."""

from __future__ import annotations

from typing import Any

from megatron_dapo.rewards.failure_rate import FailureTally
from megatron_dapo.rewards.pool import RewardPool
from megatron_dapo.rewards.table import RewardTask
from megatron_dapo.types import RewardResult


class GuardedPool:
    """The pool's own `submit`, `poll` and `pending`, with a tally of the step.

    While fewer than `expected` responses of the step are scored, the share is taken of `expected`: a failure among
    the first few is no reason to stop.
    """

    def __init__(self, pool: RewardPool[Any], max_failure_rate: float, expected: int):
        self._pool, self._max_failure_rate, self._expected = pool, max_failure_rate, expected
        self._tally = FailureTally()

    def begin_step(self) -> None:
        """Forget the last step's failures."""
        self._tally = FailureTally()

    @property
    def pending(self) -> int:
        return self._pool.pending

    def submit(self, key: Any, task: RewardTask) -> None:
        self._pool.submit(key, task)

    def poll(self, wait: float) -> list[tuple[Any, RewardResult]]:
        """
        Raises:
            RewardFailureRateError: more than the allowed share of the step's responses failed.
        """
        results = self._pool.poll(wait)
        self._tally.add(result for _, result in results)
        if self._tally.failed > self._max_failure_rate * self._expected:
            self._tally.check(self._max_failure_rate)
        return results
