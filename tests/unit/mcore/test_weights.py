"""Weights in and out of a real Megatron model in one process, and checkpoints that cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.hf_read import read_hf
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.weights import export_hf, load_hf, local_parameters
from megatron_dapo.types import CheckpointError
from tests.unit.mcore.helpers import FUSED_NORMS, SHAPE, load_model, local_shapes

MODELS = [(family, tied) for tied in (False, True) for family in ("qwen2", "qwen3", "llama")]
INDEX = "model.safetensors.index.json"
TENSORS = {name: torch.ones(dims) for name, dims in hf_shapes(SHAPE).items()}


@pytest.fixture(params=MODELS, ids=[f"{family}{'-tied' * tied}" for family, tied in MODELS])
def checkpoint(request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of(*request.param)


def test_weights_come_out_as_they_went_in(layout: RankLayout, checkpoint: Path):
    chunks, shape = load_model(checkpoint)
    exported = dict(export_hf(chunks, shape))
    wanted = load_file(checkpoint / "model.safetensors")
    assert list(exported) == list(hf_shapes(shape))
    assert exported.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(exported[name], tensor), name


def test_the_model_has_the_parameters_that_the_table_is_tested_with(layout: RankLayout, checkpoint: Path):
    chunks, shape = load_model(checkpoint)
    found = {name: tuple(param.shape) for name, param in local_parameters(chunks)}
    assert found == local_shapes(shape, tp_size=1, fused_norms=False)


def test_mbridge_makes_the_same_parameters_and_the_same_checkpoint(layout: RankLayout, checkpoint: Path):
    pytest.importorskip(
        "mbridge", reason="mbridge, the oracle of the conversion, is not installed", exc_type=ImportError
    )
    from mbridge import AutoBridge

    config = AutoConfig.from_pretrained(checkpoint)
    config.tie_word_embeddings = False  # mbridge notes a tied one in its class, for all models after it
    bridge = AutoBridge.from_config(config, dtype=torch.float32)
    tensors = load_file(checkpoint / "model.safetensors")
    chunks, shape = load_model(checkpoint)
    exported = dict(export_hf(chunks, shape))
    for name, param in local_parameters(chunks):
        fused = next((name.replace(norm, FUSED_NORMS[norm]) for norm in FUSED_NORMS if name.endswith(norm)), name)
        hf_names = bridge._weight_name_mapping_mcore_to_hf(fused)
        assert torch.equal(param, bridge._weight_to_mcore_format(fused, [tensors[hf] for hf in hf_names])), name
        for hf_name, tensor in zip(*bridge._weight_to_hf_format(fused, param.data), strict=True):
            assert torch.equal(exported[hf_name], tensor), hf_name


def test_what_is_exported_is_a_copy(layout: RankLayout, checkpoint_of: Callable[..., Path]):
    chunks, shape = load_model(checkpoint_of())
    for _, tensor in export_hf(chunks, shape):
        tensor.fill_(torch.nan)
    assert all(param.isfinite().all() for _, param in local_parameters(chunks))


def test_weights_are_converted_to_the_type_of_the_model(
    layout: RankLayout, checkpoint_of: Callable[..., Path], tmp_path: Path
):
    source = checkpoint_of()
    folder = shutil.copytree(source, tmp_path / "bf16")
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    chunks, shape = load_model(folder)
    for name, tensor in export_hf(chunks, shape):
        assert torch.equal(tensor, tensors[name].bfloat16().float()), name


def test_shards_with_an_index_are_read_like_a_single_file(
    layout: RankLayout, checkpoint_of: Callable[..., Path], tmp_path: Path
):
    source = checkpoint_of()
    tensors = load_file(source / "model.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    write_shards(folder, tensors)
    chunks, shape = load_model(folder)
    for name, tensor in export_hf(chunks, shape):
        assert torch.equal(tensor, tensors[name]), name
    assert {name: tensor.sum() for name, tensor in read_hf(folder)} == {n: t.sum() for n, t in tensors.items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))


# What is wrong with a checkpoint -> what the error must name.
def nothing_there(folder: Path) -> list[str]:
    return [str(folder), "model.safetensors", INDEX]


def a_tensor_missing(folder: Path) -> list[str]:
    save_file({n: t for n, t in TENSORS.items() if n != "model.norm.weight"}, folder / "model.safetensors")
    return [str(folder), "model.norm.weight", "[6]"]


def a_wrong_shape(folder: Path) -> list[str]:
    save_file(TENSORS | {"model.norm.weight": torch.ones(7)}, folder / "model.safetensors")
    return [str(folder / "model.safetensors"), "model.norm.weight", "[7]", "[6]"]


def a_truncated_file(folder: Path) -> list[str]:
    save_file(TENSORS, folder / "model.safetensors")
    truncate(folder / "model.safetensors")
    return [str(folder / "model.safetensors")]


def a_truncated_shard(folder: Path) -> list[str]:
    write_shards(folder, TENSORS)
    truncate(folder / "b.safetensors")
    return [str(folder / "b.safetensors")]


def an_absent_shard(folder: Path) -> list[str]:
    write_shards(folder, TENSORS)
    (folder / "b.safetensors").unlink()
    return [str(folder / INDEX), "b.safetensors"]


def an_index_that_is_wrong_about_a_file(folder: Path) -> list[str]:
    write_shards(folder, TENSORS)
    index = json.loads((folder / INDEX).read_text())
    name = next(name for name, file in index["weight_map"].items() if file == "a.safetensors")
    index["weight_map"][name] = "b.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    return [str(folder / "b.safetensors"), name]


def an_index_that_is_no_json(folder: Path) -> list[str]:
    write_shards(folder, TENSORS)
    truncate(folder / INDEX)
    return [str(folder / INDEX)]


def an_index_without_a_weight_map(folder: Path) -> list[str]:
    (folder / INDEX).write_text("{}")
    return [str(folder / INDEX), "weight_map"]


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


BROKEN = [
    nothing_there,
    a_truncated_file,
    a_truncated_shard,
    an_absent_shard,
    an_index_that_is_wrong_about_a_file,
    an_index_that_is_no_json,
    an_index_without_a_weight_map,
]


@pytest.mark.parametrize("broken", [*BROKEN, a_tensor_missing, a_wrong_shape])
def test_a_checkpoint_that_does_not_fit_is_refused_with_file_and_tensor(
    layout: RankLayout, tmp_path: Path, broken: Callable[[Path], list[str]]
):
    named = broken(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_hf([], SHAPE, tmp_path)
    assert [word for word in named if word not in str(caught.value)] == []


@pytest.mark.parametrize("broken", BROKEN)
def test_reading_all_tensors_meets_the_same_errors(tmp_path: Path, broken: Callable[[Path], list[str]]):
    named = broken(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        list(read_hf(tmp_path))
    assert [word for word in named if word not in str(caught.value)] == []
