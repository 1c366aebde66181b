"""The driver's state comes back as it was, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dapo.checkpoints.errors import DamagedCheckpointError
from megatron_dapo.checkpoints.state_file import read_state, write_state
from megatron_dapo.digests import digest_file

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


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    digests = write_state(tmp_path, STATE)
    assert_equal(read_state(tmp_path), STATE)
    assert digests == {name: digest_file(tmp_path / name) for name in ("trainer.json", "arrays.safetensors")}


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


def test_numpy_numbers_and_tuples_come_back_as_plain_ones(tmp_path: Path):
    write_state(tmp_path, {"count": np.int64(3), "rate": np.float32(0.5), "pair": (1, np.bool_(True))})
    assert_equal(read_state(tmp_path), {"count": 3, "rate": 0.5, "pair": [1, True]})


def test_a_state_without_arrays_is_kept(tmp_path: Path):
    write_state(tmp_path, {"step": 1})
    assert read_state(tmp_path) == {"step": 1}


@pytest.mark.parametrize("state", [{"a": {1: "one"}}, {"a": {2, 3}}, {"a": b"raw"}], ids=["key", "set", "bytes"])
def test_a_state_that_would_come_back_changed_is_refused(tmp_path: Path, state: dict[str, Any]):
    with pytest.raises(TypeError):
        write_state(tmp_path, state)


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:20])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("trainer.json"), "trainer.json is missing"),
        (without("arrays.safetensors"), "arrays.safetensors is missing"),
        (cut("trainer.json"), "damaged"),
        (cut("arrays.safetensors"), "damaged"),
    ],
    ids=["no state", "no arrays", "cut state", "cut arrays"],
)
def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, damage: Callable[[Path], object], named: str):
    write_state(tmp_path, STATE)
    damage(tmp_path)
    with pytest.raises(DamagedCheckpointError) as caught:
        read_state(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert named in str(caught.value)
