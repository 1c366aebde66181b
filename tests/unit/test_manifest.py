"""What a checkpoint says of itself is believed only as far as its files bear it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dapo.manifest import (
    CHECKSUMS,
    FORMAT,
    META,
    MODEL,
    Stored,
    check_backend,
    find_checkpoint,
    find_faults,
    read_checksums,
    read_meta,
    write_manifest,
)
from megatron_dapo.types import CheckpointError

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with two checkpoints, the first of which is the latest."""
    for step in (1, 2):
        model = tmp_path / "checkpoints" / f"step_{step:08d}" / MODEL
        model.mkdir(parents=True)
        (model / "metadata.json").write_text(json.dumps(BACKEND))
        (model / "__0_0.distcp").write_bytes(bytes(range(100)))
        write_manifest(model.parent, {"format": FORMAT, "step": step})
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (".", "checkpoints/step_00000001"),
        ("checkpoints", "checkpoints/step_00000001"),
        ("checkpoints/step_00000002", "checkpoints/step_00000002"),
    ],
)
def test_a_checkpoint_is_found_from_its_run_and_from_itself(root: Path, path: str, found: str):
    assert find_checkpoint(root / path) == Stored(root / found, root / found / MODEL)


def test_a_bare_folder_of_megatron_is_a_checkpoint(root: Path):
    bare = root / "checkpoints" / "step_00000002" / MODEL
    assert find_checkpoint(bare) == Stored(bare, bare)


def test_nothing_there_is_told_with_what_was_looked_for(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"checkpoints/latest.*metadata\.json"):
        find_checkpoint(tmp_path)


def test_a_latest_that_names_nothing_is_told(root: Path):
    (root / "checkpoints" / "latest").write_text("step_00000009")
    with pytest.raises(CheckpointError, match="latest names step_00000009, which is no checkpoint"):
        find_checkpoint(root)


@pytest.mark.parametrize("text", ['{"format": 99}', '{"format": "2"}', "{}", "[]", '{"format": 2'])
def test_a_newer_or_damaged_meta_is_refused_with_its_file(tmp_path: Path, text: str):
    (tmp_path / META).write_text(text)
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        read_meta(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("sharded_backend", "zarr"), ("sharded_backend_version", 2)])
def test_another_backend_is_refused_with_the_field(tmp_path: Path, field: str, value: object):
    (tmp_path / "metadata.json").write_text(json.dumps(BACKEND | {field: value}))
    with pytest.raises(CheckpointError, match=rf"metadata\.json: {field} is {value!r}"):
        check_backend(tmp_path)


def flipped(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    return "is damaged: its xxh3_128 is"


def cut(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:99])
    return "has 99 bytes, 100 were written"


def removed(file: Path) -> str:
    file.unlink()
    return "is missing"


@pytest.mark.parametrize("harm", [flipped, cut, removed])
def test_a_file_that_is_not_as_written_is_named_and_no_other(root: Path, harm: Callable[[Path], str]):
    folder = root / "checkpoints" / "step_00000002"
    assert list(find_faults(folder, read_checksums(folder))) == []
    told = harm(folder / MODEL / "__0_0.distcp")
    (fault,) = find_faults(folder, read_checksums(folder))
    assert fault.file == f"{MODEL}/__0_0.distcp"
    assert fault.what.startswith(told)


@pytest.mark.parametrize(
    "entries", [{"a": {"bytes": 3}}, {"a": {"xxh3_128": ""}}, {"a": 3}, {"../b": {"bytes": 1, "xxh3_128": ""}}]
)
def test_checksums_that_say_nothing_or_point_outside_are_refused(tmp_path: Path, entries: object):
    (tmp_path / CHECKSUMS).write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=r"checksums\.json: "):
        read_checksums(tmp_path)
