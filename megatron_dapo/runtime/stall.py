"""Which rank keeps the others waiting, judged from the heartbeats of all. Pure: no clock, no thread.

A rank is accused if others have waited for the limit and it has stood still as long, where nothing excuses it:

- it does not beat: its process is stopped, or native code holds Python's lock;
- a peer has begun a collective of a group of both that this rank has not begun, and this rank itself waits for nobody;
- nobody moves, others wait or are through, and this rank does not wait;
- all wait for each other: the one that has come least far, if there is one.

Where policy and engines are groups of their own, each is judged by itself; that somebody of the other one waits counts
as others who wait.

A long rollout moves with every look at its engine. If all ranks compute, nobody waits and nobody is accused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dapo.progress import IDLE, START_UP
from megatron_dapo.runtime.beat import Beat

NAMED = 8  # of those that wait


@dataclass(frozen=True)
class Seen:
    """A rank's last beat, and the seconds since it came."""

    beat: Beat
    silent: float


@dataclass(frozen=True)
class Stall:
    """`seconds`: for which the rank has stood still, or not answered. `waiting`: ranks that waited meanwhile."""

    beat: Beat
    seconds: float
    silent: bool
    waiting: tuple[int, ...]

    def __str__(self) -> str:
        beat = self.beat
        where = beat.phase + (f", {beat.label}" if beat.label else "")
        if self.silent:
            return (
                f"rank {beat.rank} has not answered for {self.seconds:.0f} s; it was last seen in {where}. Its process "
                "is stopped, or native code holds Python's lock; its host may be gone. No stack can be had"
            )
        peers = ", ".join(str(rank) for rank in self.waiting[:NAMED]) + (", ..." if len(self.waiting) > NAMED else "")
        waited = f" while {len(self.waiting)} waited (rank {peers})" if self.waiting else ""
        return f"rank {beat.rank} stood still for {self.seconds:.0f} s in {where}{waited}. Its stack:\n{beat.stack}"


def find_stall(seen: Mapping[int, Seen], limit: float, awaited: bool = False) -> Stall | None:
    """
    Args:
        seen: by rank, all of a group that have ever beaten and have not left.
        limit: seconds of standing still, and of others' waiting, that are too long.
        awaited: a rank of another group of the run has waited for the limit.
    """
    # Nothing but imports, at the start, holds Python's lock for as long.
    silent = [rank for rank, one in seen.items() if one.silent >= limit and one.beat.phase != START_UP]
    if silent:
        first = max(silent, key=lambda rank: seen[rank].silent)
        return Stall(seen[first].beat, seen[first].silent, True, ())
    beats = {rank: one.beat for rank, one in seen.items()}
    at_work = {rank: beat for rank, beat in beats.items() if beat.phase != IDLE}
    still = {rank: beat for rank, beat in at_work.items() if beat.still >= limit and not _excused(beat)}
    idle = {rank for rank, beat in beats.items() if beat.phase == IDLE and beat.still >= limit}
    behind = {rank for rank in still if any(_has_passed(other, still[rank]) for other in still.values())}
    ahead = {rank for rank in still if any(_has_passed(still[rank], other) for other in still.values())}
    if held := [rank for rank in behind - ahead if not still[rank].wait]:
        return _stall(held, still, beats)
    if not still or len(still) < len(at_work):
        return None  # somebody moves, or takes long for a reason: the others may wait for that
    waiting = {rank for rank in still if still[rank].wait} | ahead
    if waiting != set(still):
        return (
            _stall([rank for rank in still if rank not in waiting], still, beats) if waiting | idle or awaited else None
        )
    if last := behind - ahead:
        return _stall(list(last), still, beats)
    least = min(beat.steps for beat in still.values())
    slowest = [rank for rank, beat in still.items() if beat.steps == least]
    return _stall(slowest, still, beats) if idle or len(slowest) < len(still) else None


def somebody_waits(seen: Mapping[int, Seen], limit: float) -> bool:
    """Whether a rank has done nothing but wait for the limit."""
    beats = [one.beat for one in seen.values() if one.silent < limit]
    return any(beat.wait and beat.still >= limit and not _excused(beat) for beat in beats)


def _stall(candidates: list[int], still: Mapping[int, Beat], beats: Mapping[int, Beat]) -> Stall:
    first = still[max(candidates, key=lambda rank: (still[rank].still, -rank))]
    waiting = [
        rank
        for rank, beat in beats.items()
        if rank not in candidates and (beat.wait or beat.phase == IDLE or _has_passed(beat, first))
    ]
    return Stall(first, first.still, False, tuple(sorted(waiting)))


def _has_passed(one: Beat, other: Beat) -> bool:
    """Whether `one` has begun a collective that `other` takes part in and has not begun."""
    return any(count > other.collectives[name] for name, count in one.collectives.items() if name in other.collectives)


def _excused(beat: Beat) -> bool:
    return bool(beat.patience) or beat.phase == START_UP
