"""A checkpoint is found whole or not at all, whatever moment a process was killed at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dapo.checkpoints.store import CheckpointStore, next_sequence
from tests.unit.checkpoints.small import Publish, draft_of


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def found(store: CheckpointStore) -> list[str]:
    return [entry.path.name for entry in store.entries()]


def test_nothing_is_there_before_the_first(store: CheckpointStore):
    assert store.entries() == []
    assert next_sequence(store) == 1
    store.recover()


def test_the_newest_comes_first_and_latest_names_it(store: CheckpointStore, publish: Publish):
    publish(7), publish(12)
    assert found(store) == ["step_00000012", "step_00000007"]
    assert [entry.sequence for entry in store.entries()] == [2, 1]
    assert (store.root / "latest").read_text() == "step_00000012"
    assert names(store) == ["latest", "step_00000007", "step_00000012"]


def test_newer_is_what_was_published_later_not_what_has_more_steps(store: CheckpointStore, publish: Publish):
    publish(40), publish(20)  # a run that went back to step 10 and on from there
    assert found(store) == ["step_00000020", "step_00000040"]


def test_a_draft_is_no_checkpoint_and_has_a_folder_of_its_own(store: CheckpointStore, publish: Publish):
    publish(7)
    first, second = store.begin(12), store.begin(12)
    assert first != second
    assert found(store) == ["step_00000007"]
    assert next_sequence(store) == 2


def test_a_checkpoint_of_the_same_step_is_replaced(store: CheckpointStore, publish: Publish):
    publish(7, b"old")
    path = publish(7, b"new")
    assert (path / "megatron" / "__0_0.distcp").read_bytes() == b"new"
    assert names(store) == ["latest", "step_00000007"]


def test_a_folder_without_meta_data_is_listed_with_its_problem(store: CheckpointStore, publish: Publish):
    (publish(7) / "meta.json").unlink()
    (entry,) = store.entries()
    assert "meta.json is missing" in entry.problem
    assert entry.sequence == -1


class KilledError(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def killed_at(function: str, count: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The process ends before the `count`-th call of `function` of os or shutil."""

    def install(patch: pytest.MonkeyPatch) -> None:
        module = shutil if function == "rmtree" else os
        real, calls = getattr(module, function), iter(range(1, 100))

        def ending(*args, **kwargs):
            if next(calls) == count:
                raise KilledError
            return real(*args, **kwargs)

        patch.setattr(module, function, ending)

    return install


MOMENTS = [("rename", 1), ("rename", 2), ("replace", 1), ("rmtree", 1)]


@pytest.mark.parametrize(("function", "count"), MOMENTS, ids=[f"{name} {count}" for name, count in MOMENTS])
def test_a_kill_at_any_moment_of_publishing_leaves_a_whole_checkpoint(
    store: CheckpointStore, publish: Publish, function: str, count: int
):
    publish(6), publish(7, b"old")
    draft = draft_of(store, 7, b"new", sequence=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        killed_at(function, count)(patch)
        store.publish(draft, 7)
    store.recover()
    first, second = store.entries()
    assert (first.step, second.step) == (7, 6)
    weights = (first.path / "megatron" / "__0_0.distcp").read_bytes()
    assert weights == (b"old" if function == "rename" else b"new")
    assert first.sequence == (2 if function == "rename" else 3)
    assert not [name for name in names(store) if name.startswith(".step")]
    assert (store.root / (store.root / "latest").read_text()).is_dir()


def test_only_the_newest_are_kept(store: CheckpointStore, publish: Publish):
    for step in (1, 2, 3, 4):
        publish(step)
    assert [path.name for path in store.prune(2)] == ["step_00000002", "step_00000001"]
    assert names(store) == ["latest", "step_00000003", "step_00000004"]
    assert store.prune(2) == []


@pytest.mark.parametrize("damage", ["megatron/__0_0.distcp", "checksums.json", "meta.json"])
def test_the_newest_whole_one_is_never_deleted(store: CheckpointStore, publish: Publish, damage: str):
    publish(1), publish(2)
    for step in (3, 4):
        (publish(step) / damage).unlink()
    store.prune(1)
    left = found(store)
    assert "step_00000002" in left
    assert "step_00000001" not in left


def test_a_cut_shard_does_not_count_as_whole(store: CheckpointStore, publish: Publish):
    publish(1)
    (publish(2) / "megatron" / "__0_0.distcp").write_bytes(b"w")
    assert store.prune(1) == []
    assert found(store) == ["step_00000002", "step_00000001"]


def test_a_deletion_stopped_half_way_leaves_no_half_checkpoint(store: CheckpointStore, publish: Publish):
    publish(1), publish(2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        killed_at("rmtree", 1)(patch)
        store.prune(1)
    assert found(store) == ["step_00000002"]
    store.recover()
    assert names(store) == ["latest", "step_00000002"]


def test_what_a_killed_run_still_writes_stays_out_of_the_next_one(store: CheckpointStore):
    draft = store.begin(7)
    store.recover()
    assert not draft.exists()
    with pytest.raises(FileNotFoundError):
        Path(draft, "megatron", "late").write_bytes(b"")
    assert store.begin(7) != draft
