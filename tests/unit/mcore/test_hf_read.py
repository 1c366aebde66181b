"""Slices of many files without holding many open. Broken files are in `test_weights.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.hf_read import HfReader
from megatron_dapo.mcore.hf_save import save_hf
from megatron_dapo.types import CheckpointError
from tests.unit.mcore.helpers import SHAPE

TENSORS = {name: torch.full(dims, number * 0.5) for number, (name, dims) in enumerate(hf_shapes(SHAPE).items())}


def test_a_reader_over_many_files_holds_two_open_and_reads_all(tmp_path: Path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    out = tmp_path / "out"
    save_hf(
        iter(TENSORS.items()), hf_shapes(SHAPE), torch.float32, str(tmp_path / "source"), out, True, shard_bytes=200
    )
    assert len(list(out.glob("*.safetensors"))) > 10
    with HfReader(out, hf_shapes(SHAPE)) as reader:
        for name in [*TENSORS, *reversed(TENSORS)]:
            assert torch.equal(reader.tensor(name), TENSORS[name])
            assert len(reader._open) <= 2


@pytest.mark.parametrize(
    ("extra", "strange"),
    [
        ("lm_head.weight", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.0.self_attn.q_norm.weight", True),
        ("model.layers.2.mlp.up_proj.weight", True),
    ],
)
def test_tensors_that_the_model_has_no_use_for_are_told(tmp_path: Path, extra: str, strange: bool):
    save_file(TENSORS | {extra: torch.ones(1)} if extra not in TENSORS else TENSORS, tmp_path / "model.safetensors")
    with HfReader(tmp_path, {n: dims for n, dims in hf_shapes(SHAPE).items() if n != "lm_head.weight"}) as reader:
        assert reader.without_use() == [extra] * strange


def test_a_type_that_is_no_model_s_is_refused_with_the_tensor(tmp_path: Path):
    save_file(TENSORS | {"model.norm.weight": torch.ones(6, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with (
        HfReader(tmp_path, hf_shapes(SHAPE)) as reader,
        pytest.raises(CheckpointError, match=r"model\.norm\.weight.*I8"),
    ):
        reader.dtype("model.norm.weight")
