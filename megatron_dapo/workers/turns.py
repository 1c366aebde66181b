"""Policy and engines taking turns on the devices that they share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron_dapo.config.tree import OffloadPart
from megatron_dapo.workers.policy_group import PolicyGroup
from megatron_dapo.workers.rollout import RolloutFleet


@dataclass(frozen=True)
class Turns:
    """`offload`: what of the policy leaves the device while engines write. `engines_sleep`: while the policy works."""

    policy: PolicyGroup
    engine: RolloutFleet
    offload: Collection[OffloadPart]
    engines_sleep: bool

    def policy_begins(self) -> None:
        if self.engines_sleep:
            self.engine.sleep()

    def weights_change_hands(self) -> None:
        """Before a push: room for the engines, and the policy's weights still there."""
        self._leave(part for part in self.offload if part != "weights")
        if self.engines_sleep:
            self.engine.wake()

    def engines_begin(self) -> None:
        """After a push, and after anything that brought the policy back."""
        self._leave(self.offload)

    def _leave(self, parts: Iterable[OffloadPart]) -> None:
        if leaving := tuple(parts):
            self.policy.leave_device(leaving)
