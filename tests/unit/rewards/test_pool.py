"""The reward pool with real processes and a reward function that does its worst."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.rewards.pool import RewardPool, RewardWorkerError
from megatron_dapo.rewards.table import RewardTask, VerifierSpec
from megatron_dapo.types import RewardResult

TIMEOUT = 3.0  # far above what any honest task here takes, on a busy machine too


def custom(path: str, name: str = "compute_score") -> VerifierSpec:
    return VerifierSpec(default="custom", custom_path=path, custom_name=name)


def task(what: str, **extra_info) -> RewardTask:
    return RewardTask(what, "truth", "somewhere", extra_info)


def score_all(pool: RewardPool, whats: list[str], **extra_info) -> list[RewardResult]:
    """The result of each, in order; fails where one is lost or comes twice."""
    for key, what in enumerate(whats):
        pool.submit(key, task(what, **extra_info))
    assert pool.pending == len(whats)
    came: dict[int, RewardResult] = {}
    while pool.pending:
        for key, result in pool.poll(60.0):
            assert key not in came
            came[key] = result
    assert pool.poll(60.0) == []
    return [came[key] for key in range(len(whats))]


def gone(pid: int) -> bool:
    """Whether a process has ended; waits for it up to a minute."""
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


OUTCOMES = [
    ("fine", "ok", ""),
    ("print", "ok", ""),
    ("no answer", "unparsable", ""),
    ("raise", "error", "KeyError: 'no such thing' ("),
    ("nan", "error", "{'score': nan"),
    ("none", "error", "returned None"),
    ("sys.exit", "error", "SystemExit: 3"),
    ("exit", "error", "the scoring process died: exit code 7"),
    ("kill itself", "error", "the scoring process died: killed by SIGKILL"),
    ("segfault", "error", "the scoring process died: killed by SIG"),
    ("sleep for ever", "timeout", "no verdict within 3 s"),
    ("run away", "timeout", "no verdict within 3 s"),
]


def test_every_task_comes_back_once_with_its_own_outcome(mischief):
    whats = [part for what, _, _ in OUTCOMES for part in ("fine", what, "fine")]
    with RewardPool(custom(mischief), num_workers=3, timeout=TIMEOUT, max_retries=0) as pool:
        results = score_all(pool, whats)
    for (what, status, detail), result in zip(OUTCOMES, results[1::3], strict=True):
        assert (what, result.status) == (what, status)
        assert detail in result.detail
    assert {result.status for result in results[0::3] + results[2::3]} == {"ok"}


def test_a_result_carries_every_number_and_a_failure_carries_none(mischief):
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        fine, failed = score_all(pool, ["fine", "raise"])
    assert fine == RewardResult("ok", 1.0, {"score": 1.0, "acc": 1.0, "length": 4.0}, "fine")
    assert math.isnan(failed.score)
    assert failed.metrics == {}
    assert "mischief.py:" in failed.detail


@pytest.mark.parametrize("what", ["sleep for ever", "exit"])
def test_tasks_in_one_batch_with_a_bad_one_are_scored_as_if_it_were_not_there(mischief, what):
    """One process, so that all are in its batches; verdicts that it had not sent yet are made again."""
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        results = score_all(pool, ["fine"] * 20 + [what] + ["fine"] * 20)
    assert [i for i, result in enumerate(results) if result.status != "ok"] == [20]


@pytest.mark.parametrize("max_retries, status", [(0, "error"), (1, "ok")])
def test_a_task_that_failed_is_tried_again(mischief, tmp_path, max_retries, status):
    with RewardPool(custom(mischief), num_workers=2, timeout=TIMEOUT, max_retries=max_retries) as pool:
        (result,) = score_all(pool, ["fail once"], marker=str(tmp_path / "tried"))
    assert result.status == status


def test_retries_end_and_the_last_failure_is_reported(mischief):
    with RewardPool(custom(mischief), num_workers=2, timeout=TIMEOUT, max_retries=3) as pool:
        results = score_all(pool, ["raise", "exit", "fine"])
    assert [result.status for result in results] == ["error", "error", "ok"]


def test_a_process_killed_from_outside_while_idle_or_at_work_loses_nothing(mischief):
    with RewardPool(custom(mischief), num_workers=2, timeout=TIMEOUT, max_retries=1) as pool:
        os.kill(pool.pids[0], signal.SIGKILL)
        assert {result.status for result in score_all(pool, ["fine"] * 50)} == {"ok"}
        for key in range(200):
            pool.submit(key, task("fine"))
        came = pool.poll(0.0)
        os.kill(pool.pids[1], signal.SIGKILL)
        while pool.pending:
            came += pool.poll(60.0)
    assert sorted(key for key, _ in came) == list(range(200))
    assert {result.status for _, result in came} == {"ok"}


def test_time_while_nobody_polls_counts_for_no_task_that_was_finished(mischief):
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        for key in range(3):
            pool.submit(key, task("fine"))
        came = pool.poll(0.0)
        time.sleep(TIMEOUT + 0.5)
        while pool.pending:
            came += pool.poll(60.0)
    assert [result.status for _, result in came] == ["ok"] * 3


def test_poll_waits_for_no_more_than_it_is_told_and_not_at_all_for_nothing(mischief):
    with RewardPool(custom(mischief), num_workers=1, timeout=3600, max_retries=0) as pool:
        assert pool.poll(3600.0) == []
        pool.submit("key", task("sleep for ever"))
        assert pool.poll(0.01) == []
        assert pool.pending == 1


def test_a_response_larger_than_any_pipe_buffer_goes_through(mischief):
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        results = score_all(pool, ["x" * 4_000_000, "fine"])
    assert [result.metrics["length"] for result in results] == [4_000_000, 4]


def test_a_timeout_ends_what_the_reward_function_started_too(mischief, tmp_path):
    marker = tmp_path / "pid"
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        (result,) = score_all(pool, ["leave a child"], marker=str(marker))
    assert result.status == "timeout"
    assert gone(int(marker.read_text()))


def test_sigint_ends_no_scoring_process(mischief):
    with RewardPool(custom(mischief), num_workers=2, timeout=TIMEOUT, max_retries=0) as pool:
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        assert {result.status for result in score_all(pool, ["fine"] * 20)} == {"ok"}
        assert pool.pids == pids


def test_close_ends_all_processes_and_may_be_called_twice(mischief):
    pool = RewardPool(custom(mischief), num_workers=2, timeout=TIMEOUT, max_retries=0)
    pids = pool.pids
    pool.submit(0, task("run away"))
    pool.poll(0.0)
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)


def test_a_scoring_process_imports_neither_torch_nor_numpy(mischief):
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        (result,) = score_all(pool, ["modules"])
    assert (result.status, result.pred) == ("ok", "")


def run_script(tmp_path: Path, body: str) -> subprocess.Popen:
    """A user's main script, without a guard, that has the pool's names at hand."""
    head = (
        "import time\n"
        "from megatron_dapo.rewards.pool import RewardPool\n"
        "from megatron_dapo.rewards.table import RewardTask, VerifierSpec\n"
        f"spec = VerifierSpec(default='custom', custom_path={str(tmp_path / 'mischief.py')!r})\n"
    )
    script = tmp_path / "main.py"
    script.write_text(head + body)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )


def test_the_users_script_runs_once_and_prints_of_rewards_go_to_stderr(mischief, tmp_path):
    script = run_script(
        tmp_path,
        "print('main script')\n"
        "with RewardPool(spec, 2, 60.0, 0) as pool:\n"
        "    pool.submit(0, RewardTask('print', 'truth', 'somewhere'))\n"
        "    print(pool.poll(60.0)[0][1].status)\n",
    )
    out, err = script.communicate(timeout=120)
    assert out == "main script\nok\n"
    assert "garbage" in err


def test_scoring_processes_die_with_their_parent_even_from_inside_runaway_c_code(mischief, tmp_path):
    script = run_script(
        tmp_path,
        "pool = RewardPool(spec, 2, 3600.0, 0)\n"
        "for key in range(2):\n"
        "    pool.submit(key, RewardTask('run away', 'truth', 'somewhere'))\n"
        "pool.poll(1.0)\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(3600)\n",
    )
    assert script.stdout is not None
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2
    script.kill()
    script.communicate()
    assert all(gone(pid) for pid in pids)


def test_a_pool_works_where_its_maker_thread_is_not_the_main_one_and_outlives_it(mischief):
    made: list[RewardPool] = []
    thread = threading.Thread(target=lambda: made.append(RewardPool(custom(mischief), 2, TIMEOUT, 0)))
    thread.start()
    thread.join()
    with made[0] as pool:
        assert {result.status for result in score_all(pool, ["fine"] * 10)} == {"ok"}


def test_what_cannot_be_sent_to_a_process_is_refused_when_submitted(mischief):
    with RewardPool(custom(mischief), num_workers=1, timeout=TIMEOUT, max_retries=0) as pool:
        with pytest.raises((AttributeError, TypeError, ValueError)):
            pool.submit(0, task("fine", callback=lambda: None))
        assert pool.pending == 0


def test_a_file_that_fails_when_run_is_told_with_its_traceback(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def helper():\n    return 1 / 0\n\nhelper()\n")
    with pytest.raises(RewardWorkerError, match=r"(?s)broken.py.*line 2.*ZeroDivisionError"):
        RewardPool(custom(str(path)), num_workers=2, timeout=TIMEOUT, max_retries=0)


def test_a_file_that_ends_the_process_is_told_with_how_it_ended(tmp_path):
    path = tmp_path / "deadly.py"
    path.write_text("import os\nos._exit(9)\n")
    with pytest.raises(RewardWorkerError, match="it died: exit code 9"):
        RewardPool(custom(str(path)), num_workers=1, timeout=TIMEOUT, max_retries=0)


def test_a_function_that_is_not_there_is_told_at_the_start(mischief):
    with pytest.raises(ConfigError, match=r"'compute_scor'.*it has: compute_score"):
        RewardPool(custom(mischief, "compute_scor"), num_workers=1, timeout=TIMEOUT, max_retries=0)


@pytest.mark.parametrize("num_workers, timeout, max_retries", [(0, 1.0, 0), (1, 0.0, 0), (1, 1.0, -1)])
def test_numbers_out_of_range_are_refused(num_workers, timeout, max_retries):
    with pytest.raises(
        ConfigError, match=f"num_workers {num_workers}, timeout {timeout} and max_retries {max_retries}"
    ):
        RewardPool(VerifierSpec(), num_workers, timeout, max_retries)
