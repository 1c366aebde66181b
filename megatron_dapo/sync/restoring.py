"""Weights into engines that may fail: those that did are started again and get the present weights.

Whether an engine died while it wrote or while it was given weights makes no difference: `push` and `restore` both end
with every engine running on one version, or raise.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_dapo.runtime.group import WorkerGroup
from megatron_dapo.sync.embedded import WeightSync
from megatron_dapo.workers.rollout import RolloutWorker

MAX_RESTARTS = 3  # in a row, without a push between them that was asked for


class EnginesKeepFailingError(RuntimeError):
    """Engines were started again and again without getting through a step."""


class RestoringSync:
    """A `WeightSync` around another. `say` is told of every restart."""

    def __init__(self, inner: WeightSync, engines: WorkerGroup, say: Callable[[str], None]):
        self.inner, self._engines, self._say = inner, engines, say
        self._version: int | None = None
        self._restarts = 0

    def push(self, version: int) -> None:
        """Raises EnginesKeepFailingError: see there."""
        self._version, self._restarts = version, 0
        self._settle(version)

    def restore(self) -> None:
        """Start failed engines again, with the weights of the last push.

        Raises:
            RuntimeError: no engine has failed.
            EnginesKeepFailingError: see there.
        """
        assert self._version is not None, "nothing can be written before the first push"
        if not self._restart_failed():
            raise RuntimeError("a rank answered less than it was asked, and no engine has failed")
        self._settle(self._version)

    def _settle(self, version: int) -> None:
        self.inner.push(version)
        while self._restart_failed():
            self.inner.push(version)

    def _restart_failed(self) -> bool:
        """Whether there was anything to restart."""
        failures = {n: why for n, why in enumerate(self._engines.call_all(RolloutWorker.report_failure)) if why}
        if not failures:
            return False
        self._restarts += 1
        named = "\n".join(f"engine {n}: {why}" for n, why in failures.items())
        if self._restarts > MAX_RESTARTS:
            raise EnginesKeepFailingError(
                f"engines failed {self._restarts} times on the weights of version {self._version}; see their logs.\n"
                f"{named}"
            )
        self._say(f"restarting what failed, {self._restarts} of at most {MAX_RESTARTS} times in a row\n{named}")
        self._engines.call_all(RolloutWorker.restart_failed)
        return True
