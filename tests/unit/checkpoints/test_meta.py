"""What a checkpoint is of can be read, and another model's is refused by the field that differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dapo.checkpoints.errors import DamagedCheckpointError, ForeignCheckpointError
from megatron_dapo.checkpoints.meta import FORMAT, check_fits, describe, read_meta, write_meta
from tests.unit.checkpoints.small import IDENTITY


def test_it_comes_back_with_versions_and_time(tmp_path: Path):
    meta = describe(IDENTITY, sequence=3, step=40)
    write_meta(tmp_path, meta)
    assert read_meta(tmp_path) == meta
    assert meta.versions.keys() == {"megatron_dapo", "torch", "megatron_core", "python"}
    assert meta.saved_at.endswith("+00:00")


def rewritten(folder: Path, **fields: Any) -> None:
    write_meta(folder, describe(IDENTITY, sequence=1, step=1))
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("number", "remedy"), [(FORMAT + 1, "update megatron_dapo"), (1, "its own version"), ("x", "its own version")]
)
def test_another_format_is_refused_by_file_and_field(tmp_path: Path, number: Any, remedy: str):
    rewritten(tmp_path, format=number)
    with pytest.raises(
        ForeignCheckpointError,
        match=rf"meta\.json: field format is {number!r}; this version reads {FORMAT}; .*{remedy}",
    ):
        read_meta(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', "7", '{"step": 1}'])
def test_one_that_cannot_be_read_is_named(tmp_path: Path, text: str):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"meta\.json cannot be read"):
        read_meta(tmp_path)


def test_a_folder_without_it_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(DamagedCheckpointError, match=r"meta\.json is missing.*name a \.\.\./step_N"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"family": "qwen2", "vocab_size": 91}}, "field model.vocab_size is 90, this run has 91"),
        ({"model": {"family": "llama", "vocab_size": 90}}, "field model.family is 'qwen2', this run has 'llama'"),
        ({"training": {"params_dtype": "bfloat16"}}, "field training.params_dtype is 'float32'"),
        ({"training": {}}, "field training.params_dtype is 'float32', this run has None"),
    ],
)
def test_another_model_is_refused_by_its_field(tmp_path: Path, change: dict[str, Any], told: str):
    meta = describe(IDENTITY, sequence=1, step=1)
    with pytest.raises(ForeignCheckpointError) as caught:
        check_fits(tmp_path, meta, replace(IDENTITY, **change))
    assert told in str(caught.value)
    assert str(tmp_path / "meta.json") in str(caught.value)


def test_another_layout_fits(tmp_path: Path):
    check_fits(tmp_path, describe(IDENTITY, 1, 1), replace(IDENTITY, layout={"world_size": 8, "tp_size": 2}))
