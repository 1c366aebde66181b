"""The model's part of a checkpoint goes into Megatron's model, and that of another model does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore import checkpoint
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.model_load import load_model
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.weights import local_parameters
from megatron_dapo.types import CheckpointError
from tests.unit.mcore.helpers import load_model as load_from_hf
from tests.unit.mcore.helpers import start_training


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_of_a_run_is_loaded_without_its_optimizer(
    layout: RankLayout, checkpoint_of: Callable[..., Path], tmp_path: Path, family: str, tied: bool, dtype: str
):
    source = checkpoint_of(family, tied)
    training = start_training(source)
    checkpoint.save(training.chunks, training.optimizer, tmp_path)
    _, shape = load_from_hf(source)
    chunks = build_model(shape, MegatronConfig(params_dtype=dtype))
    for _, param in local_parameters(chunks):
        param.data.fill_(torch.nan)
    load_model(chunks, shape, tmp_path)
    wanted = dict(local_parameters(training.chunks))
    assert all(torch.equal(param, wanted[name].to(param.dtype)) for name, param in local_parameters(chunks))


def test_a_model_of_another_width_is_refused_with_the_tensor(
    layout: RankLayout, checkpoint_of: Callable[..., Path], tmp_path: Path
):
    training = start_training(checkpoint_of())
    checkpoint.save(training.chunks, training.optimizer, tmp_path)
    chunks, shape = load_from_hf(checkpoint_of())
    with pytest.raises(CheckpointError, match=r"mlp\.linear_fc1\.weight has shape \[2, 96, 32\]"):
        load_model(chunks, replace(shape, ffn_hidden_size=64), tmp_path)
