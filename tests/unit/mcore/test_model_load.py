"""The model's part of a checkpoint goes into Megatron's model, and that of another model does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.model_load import load_model
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.weights import local_parameters
from megatron_dapo.types import CheckpointError
from tests.unit.mcore.helpers import load_model as load_from_hf
from tests.unit.mcore.helpers import save_model


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_megatron_saved_is_loaded_in_the_type_of_the_model(
    layout: RankLayout, checkpoint_of: Callable[..., Path], tmp_path: Path, family: str, tied: bool, dtype: str
):
    saved, shape = load_from_hf(checkpoint_of(family, tied))
    folder = save_model(saved, tmp_path / "saved")
    chunks = build_model(shape, MegatronConfig(params_dtype=dtype))
    for _, param in local_parameters(chunks):
        param.data.fill_(torch.nan)
    load_model(chunks, shape, folder)
    wanted = dict(local_parameters(saved))
    assert all(torch.equal(param, wanted[name].to(param.dtype)) for name, param in local_parameters(chunks))


def test_a_model_of_another_width_is_refused_with_the_tensor(
    layout: RankLayout, checkpoint_of: Callable[..., Path], tmp_path: Path
):
    chunks, shape = load_from_hf(checkpoint_of())
    folder = save_model(chunks, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"mlp\.linear_fc1\.weight has shape \[2, 96, 32\]"):
        load_model(chunks, replace(shape, ffn_hidden_size=64), folder)
