"""What is written here is what Megatron would have written: the same tensors, which it loads, and mbridge's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig

from megatron_dapo.mcore.dist_read import DistReader, dist_tensors
from megatron_dapo.mcore.dist_write import write_model
from megatron_dapo.mcore.families import ModelShape, shape_of
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.hf_read import HfReader
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.safe_load import read_metadata
from tests.unit.mcore.helpers import load_model, save_model
from tests.unit.tiny_checkpoint import FAMILIES, FAMILY_NAMES


@pytest.fixture(params=FAMILIES, ids=FAMILY_NAMES)
def source(request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of(*request.param)


def written(source: Path, folder: Path, file_bytes: int = 10**9) -> ModelShape:
    shape = shape_of(AutoConfig.from_pretrained(source))
    folder.mkdir()
    with HfReader(source, hf_shapes(shape)) as hf:
        write_model(hf, shape, folder, file_bytes, lambda count: None)
    return shape


def sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    entries = read_metadata(folder).state_dict_metadata
    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def test_names_and_shapes_are_those_that_megatron_saves(layout: RankLayout, source: Path, tmp_path: Path):
    written(source, tmp_path / "written")
    chunks, _ = load_model(source)
    save_model(chunks, tmp_path / "saved")
    assert sizes(tmp_path / "written") == sizes(tmp_path / "saved")


def test_mbridge_makes_the_same_tensors(source: Path, tmp_path: Path):
    pytest.importorskip(
        "mbridge", reason="mbridge, the oracle of the conversion, is not installed", exc_type=ImportError
    )
    from mbridge import AutoBridge

    import megatron_dapo.mcore  # noqa: F401  (makes Megatron importable without CUDA)

    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = False  # mbridge notes a tied one in its class, for all models after it
    bridge = AutoBridge.from_config(config, dtype=torch.float32)
    shape, tensors = written(source, tmp_path / "written"), load_file(source / "model.safetensors")
    reader = DistReader(tmp_path / "written", shape)
    for tensor in dist_tensors(shape):
        hf_names = bridge._weight_name_mapping_mcore_to_hf(tensor.name)
        wanted = bridge._weight_to_mcore_format(tensor.name, [tensors[name] for name in hf_names])
        assert torch.equal(reader.read(tensor), wanted), tensor.name


def test_files_hold_no_more_than_they_may_but_for_a_single_tensor(checkpoint_of: Callable[..., Path], tmp_path: Path):
    limit = 20_000
    shape = written(checkpoint_of(), tmp_path / "written", limit)
    files = sorted((tmp_path / "written").glob("*.distcp"))
    assert len(files) > 3
    largest = max(4 * torch.Size(tensor.dims).numel() for tensor in dist_tensors(shape))
    overhead = 2_000  # of torch.save, a tensor
    assert all(file.stat().st_size <= max(limit, largest) + overhead for file in files)
