"""How many prompts the next generation batch draws, from the share of groups accepted so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

HALF_LIFE_BATCHES = (
    2  # full generation batches after which an observation counts half: the pass rate drifts in training
)
Z = 1.28  # a generation batch that is not capped brings enough groups 9 times in 10


@dataclass(frozen=True)
class PassRate:
    """Groups drawn and accepted so far, older ones counting less."""

    drawn: float = 0.0
    accepted: float = 0.0

    def after(self, drawn: int, accepted: int, gen_batch_size: int) -> PassRate:
        kept = 0.5 ** (drawn / (HALF_LIFE_BATCHES * gen_batch_size))
        return PassRate(kept * self.drawn + drawn, kept * self.accepted + accepted)

    def demand(self, missing: int, gen_batch_size: int) -> int:
        """Prompts to draw so that `missing` groups are accepted, at most `gen_batch_size`.

        With p the rate and m prompts, m·p ± sqrt(m·p·(1-p)) groups are accepted; m solves that for `missing` at Z
        deviations, to first order: a short last generation batch costs a whole longest response. Where nothing was
        seen yet, or nothing passed, it is a full generation batch.
        """
        rate = self.accepted / self.drawn if self.drawn else 0.0
        if rate * gen_batch_size <= missing:
            return gen_batch_size
        return min(math.ceil((missing + Z * math.sqrt(missing * (1 - rate))) / rate), gen_batch_size)
