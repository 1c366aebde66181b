"""Tensors are read from what `torch.save` wrote, in whatever order and type; anything else is refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dapo.mcore.shard_read import ShardReader
from megatron_dapo.types import CheckpointError

ROWS_4 = torch.arange(24.0).reshape(4, 6)


def write(folder: Path, parts: dict[tuple[int, int], Any], size: Sequence[int] = (4, 6)) -> Metadata:
    """Tensor "t" of `size` in one file, its `parts` by where they begin; a text stands before and between them."""
    content, places, chunks = b"text", {}, []
    for offsets, part in parts.items():
        entry = io.BytesIO()
        torch.save(part, entry)
        places[MetadataIndex("t", torch.Size(offsets))] = _StorageInfo("f", len(content), len(entry.getvalue()))
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
        content += entry.getvalue() + b"text"
    (folder / "f").write_bytes(content)
    entries = {"t": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)}
    return Metadata(entries, None, places)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parts",
    [
        {(0, 0): ROWS_4},
        {(0, 0): ROWS_4[:, :2].clone(), (0, 2): ROWS_4[:, 2:].clone()},
        {(0, 0): ROWS_4[:1].clone(), (1, 0): ROWS_4[1:].clone()},
        {(0, 0): ROWS_4[:, :2], (0, 2): ROWS_4[:, 2:]},
        {(0, 0): ROWS_4.t().contiguous().t()},
        {(0, 0): ROWS_4.double()},
        {(0, 0): ROWS_4.bfloat16()},
    ],
    ids=["whole", "columns", "rows", "parts of a larger storage", "transposed", "float64", "bfloat16"],
)
@pytest.mark.parametrize("box", [(slice(0, 4), slice(0, 6)), (slice(1, 3), slice(1, 5)), (slice(0, 1), slice(0, 6))])
def test_any_part_of_a_tensor_is_read_from_any_cut_of_it(
    tmp_path: Path, parts: dict[tuple[int, int], torch.Tensor], box: tuple[slice, slice]
):
    target = torch.full_like(ROWS_4[box], -1.0)
    with ShardReader(tmp_path, write(tmp_path, parts)) as reader:
        assert reader.fill("t", target, [side.start for side in box]) == target.numel()
    assert torch.equal(target, ROWS_4[box])


def test_a_target_that_is_a_part_of_a_larger_tensor_is_filled_and_no_more(tmp_path: Path):
    around = torch.zeros(6, 8)
    with ShardReader(tmp_path, write(tmp_path, {(0, 0): ROWS_4})) as reader:
        reader.fill("t", around[1:5, 1:7], (0, 0))
    assert torch.equal(around[1:5, 1:7], ROWS_4)
    assert around.sum() == ROWS_4.sum()


def test_tensors_of_many_pages_are_read_from_among_others(tmp_path: Path):
    wanted = torch.randn(300, 100, generator=torch.Generator().manual_seed(1))
    metadata = write(tmp_path, {(0, 0): wanted[:200].clone(), (200, 0): wanted[200:].clone()}, wanted.shape)
    found = torch.zeros(300, 100)
    with ShardReader(tmp_path, metadata) as reader:
        assert reader.fill("t", found[:200], (0, 0)) + reader.fill("t", found[200:], (200, 0)) == wanted.numel()
    assert torch.equal(found, wanted)


def test_what_no_file_holds_is_not_counted_as_filled(tmp_path: Path):
    with ShardReader(tmp_path, write(tmp_path, {(0, 0): ROWS_4[:3].clone()})) as reader:
        assert reader.fill("t", torch.zeros(4, 6), (0, 0)) == 18


class Evil:
    shape = torch.Size((4, 6))

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.file)!r}, 'w').close()",))


def cut_off(folder: Path) -> Metadata:
    metadata = write(folder, {(0, 0): ROWS_4})
    (folder / "f").write_bytes((folder / "f").read_bytes()[:-100])
    return metadata


def missing(folder: Path) -> Metadata:
    metadata = write(folder, {(0, 0): ROWS_4})
    (folder / "f").unlink()
    return metadata


def no_archive(folder: Path) -> Metadata:
    metadata = write(folder, {(0, 0): ROWS_4})
    (folder / "f").write_bytes(bytes((folder / "f").stat().st_size))
    return metadata


def of_another_shape(folder: Path) -> Metadata:
    metadata = write(folder, {(0, 0): ROWS_4})
    metadata.state_dict_metadata["t"].chunks[0].sizes = torch.Size((6, 4))  # type: ignore[union-attr]
    return metadata


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut_off, "the file is cut off"),
        (missing, "No such file"),
        (no_archive, "not a zip file"),
        (of_another_shape, r"it has shape \[4, 6\], .metadata says \[6, 4\]"),
    ],
)
def test_damage_is_an_error_that_names_file_and_tensor(tmp_path: Path, spoil: Callable[[Path], Metadata], reason: str):
    with ShardReader(tmp_path, spoil(tmp_path)) as reader, pytest.raises(CheckpointError, match=reason) as caught:
        reader.fill("t", torch.zeros(4, 6), (0, 0))
    assert f"{tmp_path / 'f'}: t cannot be read" in str(caught.value)


def test_a_pickle_in_a_tensors_place_is_refused_before_it_runs(tmp_path: Path):
    metadata = write(tmp_path, {(0, 0): Evil(tmp_path / "ran")})
    with ShardReader(tmp_path, metadata) as reader, pytest.raises(CheckpointError, match=r"asks for \w+\.exec"):
        reader.fill("t", torch.zeros(4, 6), (0, 0))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_an_objects_place_is_refused_before_it_runs(tmp_path: Path):
    metadata = write(tmp_path, {(0, 0): Evil(tmp_path / "ran")})
    (place,) = metadata.storage_data.values()
    metadata = Metadata({"o": BytesStorageMetadata()}, None, {MetadataIndex("o"): place})
    with ShardReader(tmp_path, metadata) as reader, pytest.raises(CheckpointError, match="o cannot be read"):
        reader.value("o")
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_is_not_there_is_an_error_that_names_it(tmp_path: Path):
    with (
        ShardReader(tmp_path, write(tmp_path, {(0, 0): ROWS_4})) as reader,
        pytest.raises(CheckpointError, match="has no tensor u"),
    ):
        reader.fill("u", torch.zeros(4, 6), (0, 0))
