"""From a Hugging Face config to a shape: what is read, what is refused, what a layout can split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.mcore.families import shape_of
from tests.unit.mcore.helpers import SHAPE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def config_of(family: str, **settings: Any) -> transformers.PreTrainedConfig:
    return AutoConfig.for_model(family, **SIZES, **settings)


@pytest.mark.parametrize(
    ("family", "head_dim", "qkv_bias", "qk_norm"),
    [("qwen2", 8, True, False), ("qwen3", 128, False, True), ("llama", 8, False, False)],
)
def test_each_family_is_read_with_its_switches(family: str, head_dim: int, qkv_bias: bool, qk_norm: bool):
    shape = shape_of(config_of(family, vocab_size=77, intermediate_size=40, rms_norm_eps=1e-5))
    assert (shape.family.qkv_bias, shape.family.qk_norm) == (qkv_bias, qk_norm)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (3, 32, 40)
    assert (shape.num_heads, shape.num_kv_heads, shape.heads_per_group, shape.head_dim) == (4, 2, 2, head_dim)
    assert (shape.vocab_size, shape.norm_eps, shape.rope_scaling_factor) == (77, 1e-5, None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_config_gives_the_same_shape(tmp_path: Path, tied: bool):
    config = config_of("qwen3", head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path)
    shape = shape_of(AutoConfig.from_pretrained(tmp_path))
    assert shape == shape_of(config)
    assert (shape.tied, shape.head_dim, shape.rope_theta) == (tied, 16, 1e6)


def test_the_scaling_of_llama_3_1_is_read():
    shape = shape_of(config_of("llama", rope_parameters=LLAMA3))
    assert (shape.rope_theta, shape.rope_scaling_factor) == (500000.0, 8.0)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_config_of_transformers_4_is_read(scaled: bool):
    """There the rotary base stands beside the scaling, not in it."""
    settings = config_of("llama").to_dict()
    del settings["rope_parameters"]
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    config = SimpleNamespace(**settings, rope_theta=500000.0, rope_scaling=scaling if scaled else None)
    shape = shape_of(config)
    assert (shape.rope_theta, shape.rope_scaling_factor) == (500000.0, 8.0 if scaled else None)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (AutoConfig.for_model("gpt2"), ["'gpt2'", "llama, qwen2, qwen3"]),
        (config_of("qwen2", use_sliding_window=True), ["use_sliding_window", "set it to false"]),
        (config_of("qwen2", hidden_act="gelu"), ["hidden_act", "'gelu'", "'silu'"]),
        (config_of("qwen2", rope_parameters={**LLAMA3, "rope_type": "yarn"}), ["'yarn'", "'llama3'"]),
        (config_of("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), ["'linear'"]),
        (config_of("llama", rope_parameters=LLAMA3 | {"high_freq_factor": 5.0}), ["high_freq_factor", "5.0", "4.0"]),
        (config_of("llama", attention_bias=True), ["attention_bias true", "wanted false"]),
        (config_of("qwen3", attention_bias=True), ["attention_bias true", "wanted false"]),
        (config_of("llama", mlp_bias=True), ["mlp_bias true", "wanted false"]),
    ],
    ids=lambda value: value[0].strip("'") if isinstance(value, list) else None,
)
def test_what_is_not_supported_is_refused(config: transformers.PreTrainedConfig, named: list[str]):
    with pytest.raises(ConfigError) as caught:
        shape_of(config)
    assert [word for word in named if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("changes", "layout", "named"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, (4, 1, None), ["num_attention_heads 6", "size 4", "[1, 2, 3]"]),
        ({"num_heads": 8, "num_kv_heads": 2}, (4, 1, None), ["num_key_value_heads 2", "size 4", "[1, 2]"]),
        ({"ffn_hidden_size": 6}, (4, 1, None), ["intermediate_size 6", "size 4", "[1, 2, 3]"]),
        ({"num_layers": 5}, (1, 2, None), ["5 layers", "2 pipeline stages", "divisor of 5"]),
        ({"num_layers": 6}, (1, 2, 2), ["6 layers", "4 pipeline stages", "pipeline 2 x virtual pipeline 2"]),
    ],
    ids=["heads", "key/value heads", "feed-forward", "layers", "virtual stages"],
)
def test_a_layout_that_cannot_split_the_model_is_refused_with_a_remedy(
    changes: dict[str, int], layout: tuple[int, int, int | None], named: list[str]
):
    shape = replace(SHAPE, **changes)
    with pytest.raises(ConfigError) as caught:
        shape.check_splits(*layout)
    assert [word for word in named if word not in str(caught.value)] == []


@pytest.mark.parametrize("layout", [(1, 1, None), (4, 1, None), (2, 2, None)])
def test_a_layout_that_can_split_the_model_is_accepted(layout: tuple[int, int, int | None]):
    SHAPE.check_splits(*layout)


@pytest.mark.parametrize(
    ("vocab", "tp_size", "padded"), [(11, 1, 11), (11, 2, 12), (11, 4, 12), (12, 4, 12), (1, 4, 4)]
)
def test_the_vocabulary_is_padded_to_the_next_multiple(vocab: int, tp_size: int, padded: int):
    assert replace(SHAPE, vocab_size=vocab).padded_vocab_size(tp_size) == padded
