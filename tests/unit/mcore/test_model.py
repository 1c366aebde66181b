"""The Megatron model computes what transformers' does, also where the families' settings bend the arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import ConfigError, MegatronConfig
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.head import DapoHead
from megatron_dapo.mcore.model import build_model
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.schedule import Model, log_probs
from tests.functional import oracle
from tests.functional.tiny_models import make_rollouts, save_tiny_model
from tests.unit.mcore.families.test_dense import LLAMA3
from tests.unit.mcore.helpers import SHAPE, load_model

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary scaling of Llama-3.1": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "another rotary base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 37.0}}),
    "another norm epsilon": ("qwen3", {"rms_norm_eps": 0.5}),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_log_probs_are_those_of_transformers(layout: RankLayout, tmp_path: Path, name: str, packed: bool):
    family, changes = SETTINGS[name]
    save_tiny_model(tmp_path, family, tied=False, layers=2)
    rollouts = make_rollouts()
    plain = oracle.all_logp(tmp_path, rollouts.sequences)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    wanted = oracle.all_logp(tmp_path, rollouts.sequences)
    assert np.abs(wanted - plain).max() > 1e-3  # the setting matters to this model

    chunks, _ = load_model(tmp_path)
    objective = Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0)
    (found,) = log_probs(Model(chunks, objective, packed, chunks[0].config), [rollouts.sequences]).tokens
    assert np.abs(found.logp - wanted).max() < 1e-5


def test_a_layout_that_cannot_split_the_model_is_refused_before_it_is_built():
    with pytest.raises(ConfigError, match="num_key_value_heads 2 cannot be split over tensor_model_parallel_size 4"):
        build_model(replace(SHAPE, num_kv_heads=2), MegatronConfig(tensor_model_parallel_size=4))


def test_the_head_stands_in_the_output_layer(layout: RankLayout):
    (chunk,) = build_model(SHAPE, MegatronConfig())
    assert isinstance(chunk.output_layer, DapoHead)
    assert chunk.output_layer.vocabulary.size == SHAPE.vocab_size


def test_every_split_parameter_is_marked_for_the_gradient_norm(layout: RankLayout):
    (chunk,) = build_model(SHAPE, MegatronConfig())
    for name, param in chunk.named_parameters():
        assert getattr(param, "tensor_model_parallel", False) == ("norm" not in name), name
