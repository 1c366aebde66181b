"""The model families: one visible table by Hugging Face's `model_type`.

A new dense family is one `Family` here; a family with other layers also needs its names in `names.py`.
"""

from __future__ import annotations

from typing import Any

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.mcore.families.dense import Family, ModelShape, read_shape

FAMILIES: dict[str, Family] = {
    "qwen2": Family("qwen2", qkv_bias=True, qk_norm=False),  # Qwen2 and Qwen2.5
    "qwen3": Family("qwen3", qkv_bias=False, qk_norm=True),
    "llama": Family("llama", qkv_bias=False, qk_norm=False),  # Llama-3, 3.1, 3.2
}


def shape_of(hf_config: Any) -> ModelShape:
    """The shape of the model that a Hugging Face config describes.

    Raises:
        ConfigError: a family that is not in the table, or a setting of it that is not supported.
    """
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ConfigError(
            f"model_type {hf_config.model_type!r} is not a family that can be trained here; "
            f"there are {', '.join(sorted(FAMILIES))} (see mcore/families)"
        )
    return read_shape(family, hf_config)
