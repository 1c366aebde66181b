"""The record of how far a process has come."""

from __future__ import annotations

import pickle

from megatron_dapo.progress import START_UP, Progress
from megatron_dapo.workers.policy import PolicyWorker


def test_a_step_and_a_new_phase_both_count_as_progress() -> None:
    progress = Progress()
    assert (progress.phase, progress.steps) == (START_UP, 0)
    progress.step("micro-batch 1 of 2")
    assert (progress.label, progress.steps) == ("micro-batch 1 of 2", 1)
    progress.enter("PolicyWorker.update")
    assert (progress.phase, progress.label, progress.steps) == ("PolicyWorker.update", "", 2)


def test_waits_and_excuses_end_with_their_block_and_go_back_to_the_outer_one() -> None:
    progress = Progress()
    with progress.patient("outer"):
        with progress.patient("inner"), progress.waiting("a bucket"):
            assert (progress.patience, progress.wait) == ("inner", "a bucket")
        assert (progress.patience, progress.wait) == ("outer", "")
    assert progress.patience == ""


def test_a_patient_method_still_travels_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(PolicyWorker.save_outcome)) is PolicyWorker.save_outcome
