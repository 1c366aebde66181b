"""The newest whole checkpoint is taken up, a damaged one passed over with its reason, a foreign one refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dapo.checkpoints.errors import DamagedCheckpointError, ForeignCheckpointError
from megatron_dapo.checkpoints.meta import Identity
from megatron_dapo.checkpoints.resume import Found, find
from megatron_dapo.checkpoints.store import CheckpointStore
from megatron_dapo.digests import digest_files
from tests.unit.checkpoints.small import IDENTITY, Publish

SHARD = "megatron/__0_0.distcp"


def look(
    store: CheckpointStore, mode: str = "auto", said: list[str] | None = None, wanted: Identity = IDENTITY
) -> Found | None:
    report = (said if said is not None else []).append
    return find(mode, [store], wanted, lambda root, names: digest_files(Path(root), names), report)


def test_the_newest_is_taken_with_its_state(store: CheckpointStore, publish: Publish):
    assert look(store) is None
    publish(7)
    newest = publish(12)
    found = look(store)
    assert (found.path, found.state, found.meta.step) == (newest, {"step": 12}, 12)


def test_where_to_resume_can_be_said(store: CheckpointStore, publish: Publish):
    first, _ = publish(7), publish(12)
    assert look(store, "disable") is None
    assert look(store, str(first)).path == first


def change(name: str) -> Callable[[Path], object]:
    """One bit of the file's last byte."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return damage


def cut(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


def without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


FILES = [SHARD, "trainer.json", "arrays.safetensors"]
DAMAGES = [
    *[pytest.param(change(name), name, id=f"one bit of {name}") for name in FILES],
    *[pytest.param(cut(name), name, id=f"{name} is cut") for name in FILES],
    *[
        pytest.param(without(name), name, id=f"no {name}")
        for name in (SHARD, "trainer.json", "arrays.safetensors", "meta.json", "checksums.json")
    ],
    pytest.param(cut("meta.json"), "meta.json", id="meta.json is cut"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_one_is_passed_over_with_the_file_that_is_to_blame(
    store: CheckpointStore, publish: Publish, damage: Callable[[Path], object], named: str
):
    older, newest = publish(7), publish(12)
    damage(newest)
    said: list[str] = []
    assert look(store, said=said).path == older
    (reason,) = said
    assert f"passing over {newest}" in reason
    assert str(newest / named) in reason


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_one_that_was_asked_for_is_an_error(
    store: CheckpointStore, publish: Publish, damage: Callable[[Path], object], named: str
):
    publish(7)
    newest = publish(12)
    damage(newest)
    with pytest.raises(DamagedCheckpointError) as caught:
        look(store, str(newest))
    assert str(newest / named) in str(caught.value)


def test_if_none_is_whole_the_run_does_not_silently_begin_anew(store: CheckpointStore, publish: Publish):
    for step in (7, 12):
        (publish(step) / SHARD).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"none of the 2 checkpoints .* is whole.*resume_mode=disable"):
        look(store)


def test_a_newer_format_or_another_model_is_no_reason_to_pass_it_over(store: CheckpointStore, publish: Publish):
    publish(7)
    newest = publish(12)
    other = replace(IDENTITY, model=IDENTITY.model | {"vocab_size": 5})
    with pytest.raises(ForeignCheckpointError, match="vocab_size"):
        look(store, wanted=other)
    meta = json.loads((newest / "meta.json").read_text())
    (newest / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ForeignCheckpointError, match="field format is 99"):
        look(store, str(newest))


def test_the_newest_of_both_folders_counts(store: CheckpointStore, publish: Publish, tmp_path: Path):
    fallback = CheckpointStore(tmp_path / "elsewhere")
    publish(7)
    rescued = publish(9, into=fallback)
    digest = lambda root, names: digest_files(Path(root), names)  # noqa: E731
    assert find("auto", [store, fallback], IDENTITY, digest, print).path == rescued


def test_a_path_that_is_no_checkpoint_is_named(store: CheckpointStore, tmp_path: Path):
    with pytest.raises(DamagedCheckpointError, match=r"nowhere.meta\.json is missing"):
        look(store, str(tmp_path / "nowhere"))
