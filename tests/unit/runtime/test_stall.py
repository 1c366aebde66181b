"""Who is accused, from what the ranks say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dapo.progress import IDLE, START_UP
from megatron_dapo.runtime.beat import Beat
from megatron_dapo.runtime.stall import Elsewhere, Seen, find_stall, somebody_waits, somebody_works

LIMIT = 45.0
MOVING = Beat(0, "PolicyWorker.update", "micro-batch 2 of 4", 7, 0.0, "", "", {"world": 5}, "")
STILL = replace(MOVING, still=50.0, stack="in f\n")
WAITING = replace(STILL, wait="torch.distributed.all_reduce", collectives={"world": 6}, steps=9)
IN_P2P = replace(STILL, wait="torch.distributed.recv")
THROUGH = replace(STILL, phase=IDLE)


def accused(*beats: Beat, silent: dict[int, float] | None = None) -> int | None:
    seen = {n: Seen(replace(beat, rank=n), (silent or {}).get(n, 1.0)) for n, beat in enumerate(beats)}
    stall = find_stall(seen, LIMIT)
    return None if stall is None else stall.beat.rank


@pytest.mark.parametrize(
    ("rank", "beats"),
    [
        (1, [WAITING, STILL]),
        (1, [WAITING, STILL, MOVING]),  # a third one, of another group, goes on
        (2, [WAITING, WAITING, STILL, WAITING]),
        (1, [IN_P2P, STILL]),  # equal counts: the pipeline's messages are not counted
        (1, [THROUGH, STILL]),  # the others have done their part of the call
        (2, [WAITING, replace(WAITING, collectives={"world": 5}), STILL]),  # 1 is behind, and waits for 2 elsewhere
        (1, [WAITING, replace(IN_P2P, steps=8)]),  # all wait: the one that has come least far
    ],
)
def test_the_rank_that_keeps_the_others_waiting_is_accused(rank: int, beats: list[Beat]) -> None:
    assert accused(*beats) == rank


@pytest.mark.parametrize(
    "beats",
    [
        [MOVING, MOVING],
        [WAITING, MOVING],  # a long rollout, a heavy micro-batch of many steps
        [replace(WAITING, still=40.0), STILL],  # the peer has not waited for long
        [WAITING, replace(STILL, still=40.0)],
        [WAITING, replace(STILL, patience="a checkpoint is written")],
        [WAITING, replace(STILL, phase=START_UP)],
        [STILL, STILL],  # both compute: nobody waits
        [IN_P2P, IN_P2P],  # nothing tells them apart
        [THROUGH, THROUGH],  # no call is under way
        [THROUGH, IN_P2P, MOVING],
        [],
    ],
)
def test_nobody_is_accused_without_need(beats: list[Beat]) -> None:
    assert accused(*beats) is None


AWAITED = Elsewhere(waiting=("engines",), at_work=True)
FOR_WEIGHTS = replace(IN_P2P, wait="a bucket of weights")


def seen(*beats: Beat) -> dict[int, Seen]:
    return {n: Seen(replace(beat, rank=n), 1.0) for n, beat in enumerate(beats)}


@pytest.mark.parametrize(("policy", "rank"), [([STILL], 0), ([THROUGH, STILL], 1), ([WAITING, STILL], 1)])
def test_a_rank_is_accused_whom_another_group_waits_for(policy: list[Beat], rank: int) -> None:
    stall = find_stall(seen(*policy), LIMIT, AWAITED)
    assert stall is not None
    assert stall.beat.rank == rank
    assert "the engines waited. Its stack:" in stall.told(f"rank {rank} of the policy")


@pytest.mark.parametrize(
    "beats", [[MOVING], [MOVING, STILL], [replace(STILL, patience="a checkpoint is read")], [THROUGH], [IN_P2P]]
)
def test_that_another_group_waits_makes_nobody_guilty_who_is_not(beats: list[Beat]) -> None:
    assert find_stall(seen(*beats), LIMIT, AWAITED) is None


def test_where_all_wait_the_one_behind_is_not_accused_while_another_group_they_may_wait_for_is_at_work() -> None:
    engines = seen(FOR_WEIGHTS, replace(FOR_WEIGHTS, steps=9))  # one wrote longer responses than the other
    assert find_stall(engines, LIMIT, Elsewhere(at_work=True)) is None
    stall = find_stall(engines, LIMIT)
    assert stall is not None
    assert stall.beat.rank == 0


def test_a_group_waits_in_which_a_rank_has_waited_for_the_limit_or_is_through_with_a_call_of_both() -> None:
    assert somebody_waits(seen(FOR_WEIGHTS), LIMIT, or_is_through=False)
    assert somebody_waits(seen(MOVING, THROUGH), LIMIT, or_is_through=True)
    assert not somebody_waits(seen(replace(THROUGH, still=40.0)), LIMIT, or_is_through=True)
    for beat in (MOVING, STILL, THROUGH, replace(WAITING, still=40.0)):
        assert not somebody_waits(seen(beat), LIMIT, or_is_through=False)


def test_a_group_works_while_a_call_is_under_way_on_one_of_its_ranks() -> None:
    assert somebody_works(seen(THROUGH, STILL))
    assert not somebody_works(seen(THROUGH))


def test_a_group_that_only_one_of_them_is_in_says_nothing() -> None:
    assert accused(replace(STILL, collectives={"tp": 9}), replace(STILL, collectives={"dp": 1})) is None


def test_a_rank_that_does_not_beat_is_accused_in_any_phase_but_the_start() -> None:
    assert accused(MOVING, MOVING, silent={1: 46.0}) == 1
    assert accused(MOVING, THROUGH, silent={1: 46.0}) == 1
    assert accused(MOVING, replace(MOVING, patience="a checkpoint is read"), silent={1: 46.0}) == 1
    assert accused(MOVING, replace(MOVING, phase=START_UP), silent={1: 46.0}) is None
    assert accused(MOVING, MOVING, silent={1: 44.0}) is None


def test_the_report_names_rank_phase_step_who_waited_and_the_stack() -> None:
    stall = find_stall({0: Seen(WAITING, 1.0), 1: Seen(replace(STILL, rank=1), 1.0)}, LIMIT)
    assert stall is not None
    assert stall.told("rank 1") == (
        "rank 1 stood still for 50 s in PolicyWorker.update, micro-batch 2 of 4 while 1 waited (rank 0). "
        "Its stack:\nin f\n"
    )


def test_the_report_of_a_silent_rank_says_where_it_was_last_seen() -> None:
    stall = find_stall({1: Seen(replace(MOVING, rank=1), 46.0)}, LIMIT)
    assert stall is not None
    assert stall.told("rank 1").startswith(
        "rank 1 has not answered for 46 s; it was last seen in PolicyWorker.update, micro-batch 2 of 4. Its process"
    )
