"""Checkpoints that ask for more than tensors are refused before anything of theirs runs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.safe_load import read_metadata, refuse_foreign_pickles
from megatron_dapo.types import CheckpointError
from tests.unit.mcore.helpers import load_model, save_model


class Evil:
    """Writes `file` when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.file)!r}, 'w').close()",))


@pytest.fixture
def folder(layout: RankLayout, checkpoint_of: Any, tmp_path: Path) -> Path:
    """A model as Megatron saves it, extra states included."""
    chunks, _ = load_model(checkpoint_of())
    return save_model(chunks, tmp_path / "saved")


def test_what_megatron_saves_passes(folder: Path):
    metadata = refuse_foreign_pickles(folder)
    kinds = {type(entry) for entry in metadata.state_dict_metadata.values()}
    assert BytesStorageMetadata in kinds, "without an entry of bytes this test would not show that they pass"
    assert len(metadata.state_dict_metadata) == len(
        pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    )


def metadata_that_runs_code(folder: Path, ran: Path) -> str:
    metadata = read_metadata(folder)
    metadata.planner_data = Evil(ran)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".metadata"


def common_that_runs_code(folder: Path, ran: Path) -> str:
    torch.save({"optimizer": Evil(ran)}, folder / "common.pt")
    return "common.pt"


def bytes_that_run_code(folder: Path, ran: Path) -> str:
    metadata = read_metadata(folder)
    index = next(i for i in metadata.storage_data if "_extra_state" in i.fqn)
    file = folder / "__9_0.distcp"
    torch.save(Evil(ran), file)
    info = metadata.storage_data[index]
    metadata.storage_data[index] = type(info)(file.name, 0, file.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return index.fqn


@pytest.mark.parametrize("attack", [metadata_that_runs_code, common_that_runs_code, bytes_that_run_code])
def test_a_pickle_that_runs_code_is_refused_by_name_and_does_not_run(folder: Path, tmp_path: Path, attack: Any):
    ran = tmp_path / "ran"
    named = attack(folder, ran)
    with pytest.raises(CheckpointError) as caught:
        refuse_foreign_pickles(folder)
    assert named in str(caught.value)
    assert not ran.exists()


def test_the_attack_on_the_metadata_would_have_run_without_the_check(folder: Path, tmp_path: Path):
    metadata_that_runs_code(folder, tmp_path / "ran")
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()


def test_a_file_outside_the_checkpoint_is_refused(folder: Path):
    metadata = read_metadata(folder)
    index, info = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = type(info)("../elsewhere", info.offset, info.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        refuse_foreign_pickles(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(MetadataIndex("a"))])
def test_metadata_that_is_none_is_refused_with_its_file(tmp_path: Path, content: bytes):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(tmp_path)


def test_cut_off_metadata_is_refused_with_its_file(folder: Path):
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        refuse_foreign_pickles(folder)


def test_the_switch_that_makes_torch_run_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        refuse_foreign_pickles(folder)
