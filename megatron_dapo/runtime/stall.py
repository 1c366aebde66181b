"""Which rank keeps the others waiting, judged from the heartbeats of all. Pure: no clock, no thread.

A rank is accused if others have waited for the limit and it has stood still as long, where nothing excuses it:

- it does not beat: its process is stopped, or native code holds Python's lock;
- a peer has begun a collective of a group of both that this rank has not begun, and this rank itself waits for nobody;
- nobody moves, others wait or are through, and this rank does not wait;
- all wait for each other: the one that has come least far, if there is one.

Where policy and engines are groups of their own, each is judged by itself. That somebody of the other one waits counts
as others who wait; and while a call is under way there, ranks that all wait may wait for it, so that none of them is
accused.

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
    elsewhere: tuple[str, ...] = ()  # groups with ranks that waited, other than the rank's own

    def told(self, name: str) -> str:
        """`name`: of the rank, "rank 1"."""
        beat = self.beat
        where = beat.phase + (f", {beat.label}" if beat.label else "")
        if self.silent:
            return (
                f"{name} has not answered for {self.seconds:.0f} s; it was last seen in {where}. Its process "
                "is stopped, or native code holds Python's lock; its host may be gone. No stack can be had"
            )
        return f"{name} stood still for {self.seconds:.0f} s in {where}{self._while()}. Its stack:\n{beat.stack}"

    def _while(self) -> str:
        peers = ", ".join(str(rank) for rank in self.waiting[:NAMED]) + (", ..." if len(self.waiting) > NAMED else "")
        who = [f"{len(self.waiting)} waited (rank {peers})"] if self.waiting else []
        who += [f"the {group} waited" for group in self.elsewhere]
        return f" while {' and '.join(who)}" if who else ""


@dataclass(frozen=True)
class Elsewhere:
    """What there is to know of the other groups of a run."""

    waiting: tuple[str, ...] = ()  # names of those in which a rank has waited for the limit, maybe for this group
    at_work: bool = False  # whether a call is under way in one of them


def find_stall(seen: Mapping[int, Seen], limit: float, elsewhere: Elsewhere = Elsewhere()) -> Stall | None:
    """
    Args:
        seen: by rank, all of a group that have ever beaten and have not left.
        limit: seconds of standing still, and of others' waiting, that are too long.
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
        return _stall(held, still, beats, elsewhere)
    if not still or len(still) < len(at_work):
        return None  # somebody moves, or takes long for a reason: the others may wait for that
    waiting = {rank for rank in still if still[rank].wait} | ahead
    if waiting != set(still):
        busy = [rank for rank in still if rank not in waiting]
        return _stall(busy, still, beats, elsewhere) if waiting | idle or elsewhere.waiting else None
    if elsewhere.at_work:
        return None
    if last := behind - ahead:
        return _stall(list(last), still, beats, elsewhere)
    least = min(beat.steps for beat in still.values())
    slowest = [rank for rank, beat in still.items() if beat.steps == least]
    return _stall(slowest, still, beats, elsewhere) if idle or len(slowest) < len(still) else None


def somebody_waits(seen: Mapping[int, Seen], limit: float, or_is_through: bool) -> bool:
    """Whether a rank has done nothing but wait for the limit; with `or_is_through`, also for the next call."""
    beats = [one.beat for one in seen.values() if one.silent < limit and one.beat.still >= limit]
    return any(bool(beat.wait) or (or_is_through and beat.phase == IDLE) for beat in beats if not _excused(beat))


def somebody_works(seen: Mapping[int, Seen]) -> bool:
    """Whether a call is under way on a rank."""
    return any(one.beat.phase != IDLE for one in seen.values())


def _stall(candidates: list[int], still: Mapping[int, Beat], beats: Mapping[int, Beat], elsewhere: Elsewhere) -> Stall:
    first = still[max(candidates, key=lambda rank: (still[rank].still, -rank))]
    waiting = [
        rank
        for rank, beat in beats.items()
        if rank not in candidates and (beat.wait or beat.phase == IDLE or _has_passed(beat, first))
    ]
    return Stall(first, first.still, False, tuple(sorted(waiting)), elsewhere.waiting)


def _has_passed(one: Beat, other: Beat) -> bool:
    """Whether `one` has begun a collective that `other` takes part in and has not begun."""
    return any(count > other.collectives[name] for name, count in one.collectives.items() if name in other.collectives)


def _excused(beat: Beat) -> bool:
    return bool(beat.patience) or beat.phase == START_UP
