"""Three ranks under torchrun: calls, streams, big arrays, and every way in which a rank or the driver can end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.exit_codes import REQUEUE

SCRIPT = Path(__file__).with_name("spmd_cases.py")
ROOT = SCRIPT.parents[2]
UNDER_TORCHRUN = ("raise", "kill")  # here the launcher itself has a part: it ends all ranks when one exits badly
IN_FORKS = (
    "healthy",
    "start_up",
    "own_part",
    "unpicklable_result",
    "unpicklable_argument",
    "killed_when_idle",
    "hang",
    "hang_in_collective",
    "frozen_when_idle",
    "driver_fails",
    "signals_come",
    "terminated",
    "driver_dies",
    "stalls",
    "stalls_frozen",
    "driver_stalls",
    "driver_frozen",
    "long_calls",
)


def _torchrun(folder: Path, *cases: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "3",
            SCRIPT,
            folder,
            *cases,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases have left their results."""
    folder = tmp_path_factory.mktemp("spmd")
    runs = {case: _torchrun(folder, case) for case in UNDER_TORCHRUN} | {"forks": _torchrun(folder, *IN_FORKS)}
    for name, run in runs.items():
        output, _ = run.communicate(timeout=300)
        (folder / f"{name}.log").write_text(output)
        assert (run.returncode == 0) is (name == "forks"), output
    return folder


def _found(folder: Path, case: str) -> Any:
    return json.loads((folder / f"{case}.json").read_text())


def _statuses(folder: Path, case: str) -> list[str]:
    """[rank] exit status."""
    return [(folder / f"{case}.{rank}").read_text() for rank in range(3)]


@pytest.fixture(scope="module")
def healthy(folder: Path) -> dict[str, Any]:
    found = _found(folder, "healthy")
    assert "error" not in found, found
    return found


def test_each_rank_gets_its_shard_and_answers_in_its_place(healthy: dict[str, Any]):
    assert healthy["size"] == 3
    assert healthy["scatter"] == [[0, "a"], [1, {"b": 1}], [2, None]]
    assert healthy["plain_items"] == [[0, [0, 1]], [1, [1, 2]], [2, [2, 3]]]


def test_a_function_gets_each_ranks_own_host(healthy: dict[str, Any]):
    assert healthy["host"] == [["ask_host", 10], ["ask_host", 21], ["ask_host", 32]]


def test_generators_give_lists_by_rank_of_any_lengths(healthy: dict[str, Any]):
    assert healthy["generators"] == [[0, 1], [], [20, 21, 22]]


def test_items_of_other_ranks_come_between_the_drivers_own(healthy: dict[str, Any]):
    assert healthy["own_items"] < healthy["most_own_items"]


def test_large_arrays_travel_both_ways_and_leave_the_drivers_copy_alone(healthy: dict[str, Any]):
    assert healthy["large"] == [[f"{i}!", [1000, 2000], True, [2 * j for j in range(i)]] for i in range(3)]
    assert healthy["originals"] == [True, True]
    assert healthy["frozen"] == [[0, True], [1, True], [2, True]]


def test_mistakes_of_the_caller_are_told_and_break_nothing(healthy: dict[str, Any]):
    assert healthy["second_start"].startswith("RuntimeError: cannot start Worker.count: Worker.echo is not finished")
    assert healthy["after_second_start"] == [[0, 1], [1, 2], [2, 3]]
    assert healthy["wrong_shards"] == "ValueError: Worker.echo: 2 shards for 3 ranks; give one to each"
    assert "pickle" in healthy["unpicklable"]
    assert "LookupError: this process has no Shard" in healthy["foreign"]
    assert "taken already" in healthy["taken"]
    assert healthy["rest"] == [[1, [1, 2]], [2, [2, 3]]]


def test_at_the_drivers_end_the_other_ranks_leave_normally(folder: Path):
    assert _statuses(folder, "healthy") == ["0", "0", "0"]


def test_an_exception_frees_a_driver_that_waits_in_a_collective(folder: Path):
    found = _found(folder, "raise")
    assert (found["rank"], found["phase"]) == (1, "Worker.fail_in_collective")
    assert 'raise ValueError("planted")' in found["traceback"]
    assert "rank 1 failed in Worker.fail_in_collective" in (folder / "raise.log").read_text()


def test_a_killed_rank_is_named_also_when_torchrun_ends_the_driver(folder: Path):
    found = _found(folder, "kill")
    assert (found["rank"], found["phase"]) == (1, "Worker.fail_in_collective")
    assert "rank 1 died without a report" in found["traceback"]


def test_a_rank_killed_between_calls_is_named_at_the_next(folder: Path):
    found = _found(folder, "killed_when_idle")
    assert (found["rank"], found["phase"]) == (1, "waiting for a call")
    assert "rank 1 died without a report" in found["traceback"]
    assert _statuses(folder, "killed_when_idle") == ["1", "-9", "0"]


def test_a_failure_before_the_first_call_is_named(folder: Path):
    found = _found(folder, "start_up")
    assert (found["rank"], found["phase"]) == (1, "start-up")
    assert "ValueError: planted" in found["traceback"]


def test_the_drivers_own_part_fails_as_any_ranks_and_frees_those_that_wait_for_it(folder: Path):
    found = _found(folder, "own_part")
    assert (found["rank"], found["phase"]) == (0, "Worker.fail_alone")
    assert "rank 0 fails and the others wait for it" in found["traceback"]
    assert _statuses(folder, "own_part") == ["1", "0", "0"]


@pytest.mark.parametrize(
    "case, phase", [("unpicklable_result", "Worker.lock"), ("unpicklable_argument", "the reading of a call")]
)
def test_what_cannot_travel_is_the_failure_of_the_rank_that_found_it(folder: Path, case: str, phase: str):
    found = _found(folder, case)
    assert found["rank"] in (1, 2)
    assert found["phase"] == phase
    assert _statuses(folder, case) == ["1", "0", "0"]


def test_a_rank_that_hangs_is_named_with_its_phase(folder: Path):
    found = _found(folder, "hang")
    assert found["rank"] == 1
    assert found["traceback"].startswith("no answer for 2 s from rank 1 (in Worker.end_on_rank_1)")
    assert _statuses(folder, "hang") == ["1", "0", "0"]


def test_a_collective_that_times_out_says_which_rank_is_still_at_work(folder: Path):
    assert "Still at work: rank 1 (in Worker.fail_in_collective)" in _found(folder, "hang_in_collective")["traceback"]


def test_a_frozen_rank_that_takes_no_call_is_named(folder: Path):
    found = _found(folder, "frozen_when_idle")
    assert found["rank"] == 1
    assert found["traceback"].startswith("no answer for 2 s from rank 1 (in waiting for a call)")


def test_an_error_of_the_drivers_own_stays_itself_and_ends_ranks_that_hang(folder: Path):
    assert _found(folder, "driver_fails") == {"error": 'KeyError: "the driver\'s own"'}
    assert _statuses(folder, "driver_fails") == ["1", "0", "0"]


def test_signals_are_the_drivers(folder: Path):
    assert _found(folder, "signals_come") == {"error": "KeyboardInterrupt: "}
    assert _statuses(folder, "signals_come") == ["1", "0", "0"]
    assert _found(folder, "terminated") == {"error": f"SystemExit: {REQUEUE}"}
    assert _statuses(folder, "terminated") == [str(REQUEUE), "0", "0"]


def test_a_killed_driver_leaves_nobody_behind(folder: Path):
    assert _statuses(folder, "driver_dies") == ["-9", "1", "1"]


def test_a_rank_that_stalls_is_named_with_phase_and_stack_and_can_be_asked_aside(folder: Path):
    found = _found(folder, "stalls")
    assert found["stalled"] == 1
    assert "rank 1 stood still for " in found["said"]
    assert "in Worker.stall, micro-batch 3 of 8 while 2 waited (rank 0, 2). Its stack:" in found["said"]
    assert '"sleep": lambda: time.sleep(1000)' in found["said"]
    assert "Aside: [(0, 'a'), (1, 'b'), (2, 'c')]." in found["said"]
    assert _statuses(folder, "stalls") == ["1", "0", "0"]


def test_a_stopped_rank_is_said_not_to_answer_and_the_driver_gets_out_of_its_collective(folder: Path):
    assert _statuses(folder, "stalls_frozen") == ["1", "still there", "0"]
    said = (folder / "forks.log").read_text()
    assert "rank 1 has not answered for " in said
    assert "it was last seen in Worker.stall, micro-batch 3 of 8" in said
    assert "Aside: WorkerError: rank 1 failed in Worker.echo:" in said


def test_a_driver_that_stalls_itself_is_ended_by_its_watch(folder: Path):
    assert not (folder / "driver_stalls.json").exists()
    assert _statuses(folder, "driver_stalls")[0] == "1"
    assert (folder / "driver_stalls.forced").exists()
    assert "RankStalledError: rank 0 stood still for " in (folder / "forks.log").read_text()


def test_a_stopped_driver_is_left_by_the_other_ranks(folder: Path):
    assert _statuses(folder, "driver_frozen") == ["still there", "1", "1"]
    assert "rank 0, the driver, has not answered for 4 s" in (folder / "forks.log").read_text()


def test_long_rollouts_and_long_writes_are_no_stalls(folder: Path):
    assert _found(folder, "long_calls")["file"] == [None] * 3
    assert _statuses(folder, "long_calls") == ["0", "0", "0"]
