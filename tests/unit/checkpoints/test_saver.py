"""When checkpoints are written and published, and what becomes of one that cannot be written."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.checkpoints.saver import Saver, SaveRules, Snapshot
from megatron_dapo.checkpoints.state_file import read_state
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.digests import FileDigest, digest_file
from megatron_dapo.runtime.group import WorkerError
from megatron_dapo.workers.policy_group import CheckpointWriteError
from tests.unit.checkpoints.small import IDENTITY

FULL = CheckpointWriteError("rank 1: No space left on device")


@dataclass
class Ranks:
    """In place of the policy: what `finish_save` says, one after the other; None is "still writing"."""

    ends: list[CheckpointWriteError | None] = field(default_factory=list)
    started: list[tuple[str, bool]] = field(default_factory=list)
    refuses: str = "nothing"  # a part of the paths that cannot be written

    def start_save(self, path: str, background: bool) -> None:
        self.started.append((path, background))
        Path(path, "__0_0.distcp").write_bytes(b"weights")

    def finish_save(self, wait: bool) -> dict[str, FileDigest] | None:
        path = Path(self.started[-1][0])
        if self.refuses in str(path):
            raise FULL
        if self.ends and not wait:
            end = self.ends.pop(0)
            if end is None:
                return None
            raise end
        return {"__0_0.distcp": digest_file(path / "__0_0.distcp")}


class Run:
    """A saver over a run whose state is its number of steps."""

    def __init__(self, root: Path, ranks: Ranks | None = None, fallback: bool = False, **rules: Any):
        self.ranks, self.step, self.said = ranks or Ranks(), 0, []
        self.store = CheckpointStore(root / "run")
        self.fallback = CheckpointStore(root / "elsewhere") if fallback else None
        wanted = SaveRules(**({"background": True, "limit": None} | rules))
        self.saver = Saver(self.store, self.fallback, self.ranks, IDENTITY, wanted, self._snapshot, self.said.append)

    def save(self, step: int, **how: bool) -> None:
        self.step = step
        self.saver.save(**how)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.step, {"step": self.step})


def steps(store: CheckpointStore) -> list[int]:
    return [entry.step for entry in store.entries()]


def test_a_save_in_the_background_counts_when_all_ranks_have_written(tmp_path: Path):
    run = Run(tmp_path, Ranks(ends=[None, None]))
    run.save(5)
    assert steps(run.store) == []
    run.saver.poll()
    assert steps(run.store) == []
    run.step = 6  # training goes on
    run.saver.poll()
    run.saver.poll()
    assert steps(run.store) == [5]
    assert read_state(run.store.entries()[0].path) == {"step": 5}
    assert run.ranks.started[0][1] is True


def test_a_save_that_is_waited_for_is_there_at_once(tmp_path: Path):
    run = Run(tmp_path, background=False)
    run.save(5)
    assert steps(run.store) == [5]
    assert run.ranks.started[0][1] is False


def test_the_next_save_finishes_the_one_before(tmp_path: Path):
    run = Run(tmp_path, Ranks(ends=[None] * 5))
    run.save(5)
    run.save(6)
    assert steps(run.store) == [5]
    run.saver.settle(wait=True)
    assert steps(run.store) == [6, 5]


def test_no_more_than_the_limit_are_kept(tmp_path: Path):
    run = Run(tmp_path, background=False, limit=2)
    for step in (1, 2, 3):
        run.save(step)
    assert steps(run.store) == [3, 2]


def test_a_failed_background_write_is_reported_and_the_state_saved_again_at_the_next_step(tmp_path: Path):
    run = Run(tmp_path, Ranks(ends=[FULL]))
    run.save(5)
    run.step = 6
    run.saver.poll()  # in the middle of a step, where the state is not whole: kept
    assert run.said == []
    run.saver.settle()
    assert steps(run.store) == [6]
    (said,) = run.said
    assert "step_00000005" in said
    assert "rank 1: No space left on device" in said
    assert run.ranks.started[-1][1] is False
    assert not list(run.store.root.glob(".step*")), "what was written of it is gone"


def test_where_the_second_try_fails_too_the_run_ends_with_a_clear_error(tmp_path: Path):
    run = Run(tmp_path, background=False)
    run.save(4)
    run.ranks.refuses = "step"
    with pytest.raises(CheckpointWriteError, match=r"No space left .* untouched.*Make room.*fallback_local_dir"):
        run.save(5)
    assert steps(run.store) == [4]
    assert (run.store.root / "latest").read_text() == "step_00000004"


def test_then_the_fallback_folder_takes_the_state(tmp_path: Path):
    run = Run(tmp_path, Ranks(refuses="run/checkpoints"), fallback=True)
    run.save(5)
    run.step = 6
    with pytest.raises(CheckpointWriteError, match=r"after step 6 is saved in .*elsewhere"):
        run.saver.settle()
    assert steps(run.fallback) == [6]
    assert steps(run.store) == []


def test_the_last_will_completes_the_save_under_way_with_the_ranks_it_is_given(tmp_path: Path):
    run = Run(tmp_path, Ranks(ends=[None]))
    run.save(5)
    aside = Ranks(started=run.ranks.started)
    said = run.saver.last_will(lambda: aside)
    assert steps(run.store) == [5]
    path = run.store.root / "step_00000005"
    assert said == (
        f"The save after step 5 that was under way was completed. The next start goes on after step 5, from {path}."
    )


def test_the_last_will_says_which_save_is_lost_and_which_one_counts(tmp_path: Path):
    run = Run(tmp_path, background=False)
    assert run.saver.last_will(lambda: run.ranks) == "There is no checkpoint: the next start begins anew."
    run.save(4)
    assert run.saver.last_will(lambda: run.ranks).startswith("The next start goes on after step 4, from ")
    run.save(5, background=True)

    def unheard() -> Ranks:
        raise WorkerError(1, "PolicyWorker.rank_layout", "it does not answer")

    said = run.saver.last_will(unheard)
    assert "The save after step 5 that was under way is lost: rank 1 failed in" in said
    assert "The next start goes on after step 4" in said


def test_the_last_will_does_not_wait_for_a_main_thread_that_is_stuck_at_the_end_of_a_save(tmp_path: Path):
    class Stuck(Ranks):
        def finish_save(self, wait: bool) -> dict[str, FileDigest] | None:
            inside.set()
            assert gate.wait(60)
            return super().finish_save(wait)

    inside, gate = threading.Event(), threading.Event()
    run = Run(tmp_path, Stuck())
    run.save(5)
    main = threading.Thread(target=run.saver.poll)
    main.start()
    assert inside.wait(60)
    assert "is lost: a rank did not take part in its end" in run.saver.last_will(Ranks)
    gate.set()
    main.join()


def test_a_full_disk_below_the_drivers_own_files_is_the_same(tmp_path: Path):
    run = Run(tmp_path, background=False)
    run.store.root.parent.mkdir()
    run.store.root.write_text("a file where the folder should be")
    with pytest.raises(CheckpointWriteError, match="could not be written"):
        run.save(5)
