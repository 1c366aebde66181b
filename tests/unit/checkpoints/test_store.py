"""A checkpoint is found whole or not at all, and gives back the state that it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dapo.checkpoints import CheckpointStore

STATE = {
    "step": 40,
    "rate": 0.1 + 0.2,
    "none": None,
    "flag": True,
    "text": "naïve\n",
    "nan": float("nan"),
    "nested": [{"ids": np.arange(5), "more": [[1, 2.5], [], {}]}, np.array([[1.5, -0.0]], np.float32)],
    "scalar array": np.array(7.0),
    "no elements": np.zeros((0, 3), np.int32),
    "every other": np.arange(10, dtype=np.int64)[::2],
}


def write_model(folder: str) -> None:
    Path(folder, "weights").write_text("new")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


def test_a_state_comes_back_as_it_was(store: CheckpointStore):
    found = store.read_state(store.save(3, STATE, write_model))
    assert_equal(found, STATE)


def assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_equal(*pair)
    elif isinstance(wanted, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    else:
        assert type(found) is type(wanted)
        assert found == wanted or (found != found and wanted != wanted)  # NaN


def test_numpy_numbers_and_tuples_come_back_as_plain_ones(store: CheckpointStore):
    path = store.save(1, {"count": np.int64(3), "rate": np.float32(0.5), "pair": (1, np.bool_(True))}, write_model)
    assert_equal(store.read_state(path), {"count": 3, "rate": 0.5, "pair": [1, True]})


def test_a_state_without_arrays_is_kept(store: CheckpointStore):
    assert store.read_state(store.save(1, {"step": 1}, write_model)) == {"step": 1}


@pytest.mark.parametrize("state", [{"a": {1: "one"}}, {"a": {2, 3}}, {"a": b"raw"}], ids=["key", "set", "bytes"])
def test_a_state_that_would_come_back_changed_is_refused(store: CheckpointStore, state: dict[str, Any]):
    with pytest.raises(TypeError):
        store.save(1, state, write_model)
    assert store.find("auto") is None


def test_the_latest_checkpoint_is_found(store: CheckpointStore, tmp_path: Path):
    assert store.find("auto") is None
    first = store.save(7, {"step": 7}, write_model)
    assert store.find("auto") == first == tmp_path / "checkpoints" / "step_00000007"
    second = store.save(12, {"step": 12}, write_model)
    assert CheckpointStore(tmp_path).find("auto") == second
    assert (second / "megatron" / "weights").read_text() == "new"
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step_00000007", "step_00000012"]


def test_where_to_resume_can_be_said(store: CheckpointStore):
    first, _ = store.save(7, {}, write_model), store.save(12, {}, write_model)
    assert store.find("disable") is None
    assert store.find(str(first)) == first


def interrupted(folder: str) -> None:
    Path(folder, "half").write_text("of it")
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_checkpoint_before_it(store: CheckpointStore):
    before = store.save(7, {"step": 7}, write_model)
    for step in (7, 12):
        with pytest.raises(KeyboardInterrupt):
            store.save(step, {"step": step, "new": True}, interrupted)
        assert store.find("auto") == before
        assert store.read_state(before) == {"step": 7}
        assert (before / "megatron" / "weights").read_text() == "new"
    assert not (store.root / "step_00000012").exists()


def test_a_write_after_an_interrupted_one_has_none_of_its_files(store: CheckpointStore):
    with pytest.raises(KeyboardInterrupt):
        store.save(12, {}, interrupted)
    path = store.save(12, {"step": 12}, write_model)
    assert [file.name for file in (path / "megatron").iterdir()] == ["weights"]
    assert sorted(file.name for file in store.root.iterdir()) == ["latest", "step_00000012"]


def test_a_checkpoint_of_the_same_step_is_replaced(store: CheckpointStore):
    store.save(7, {"old": np.arange(3)}, lambda folder: Path(folder, "old").write_text(""))
    path = store.save(7, {"new": 1}, write_model)
    assert store.read_state(path) == {"new": 1}
    assert [file.name for file in (path / "megatron").iterdir()] == ["weights"]
    assert sorted(file.name for file in store.root.iterdir()) == ["latest", "step_00000007"]


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def another_format(path: Path) -> None:
    (path / "trainer.json").write_text(json.dumps({"format": 99, "state": {}}))


def cut(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:20])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("trainer.json"), "trainer.json"),
        (without("arrays.safetensors"), "arrays.safetensors"),
        (another_format, "format 99; this version reads 1"),
        (cut("trainer.json"), "damaged"),
        (cut("arrays.safetensors"), "damaged"),
    ],
    ids=["no state", "no arrays", "format", "cut state", "cut arrays"],
)
def test_a_checkpoint_that_cannot_be_read_is_named(
    store: CheckpointStore, damage: Callable[[Path], object], named: str
):
    path = store.save(7, STATE, write_model)
    damage(path)
    with pytest.raises(ValueError) as caught:
        store.read_state(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


def test_a_path_that_is_no_checkpoint_is_named(store: CheckpointStore, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere is no whole checkpoint: .*trainer\.json.*megatron"):
        store.read_state(store.find(str(tmp_path / "nowhere")) or tmp_path)
