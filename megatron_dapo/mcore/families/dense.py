"""Dense decoder families (RMSNorm, rotary positions, grouped-query attention, SwiGLU): from a Hugging Face config.

They differ in two switches alone; everything else is a number in `ModelShape`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dapo.config.tree import ConfigError

# Megatron fixes these of Llama-3.1's frequency scaling and takes only the factor.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    name: str
    qkv_bias: bool
    qk_norm: bool


@dataclass(frozen=True)
class ModelShape:
    """All that decides shapes and arithmetic of a dense model."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # as in the checkpoint, before padding
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None  # Llama-3.1's frequency scaling
    max_positions: int

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def padded_vocab_size(self, tp_size: int) -> int:
        """The least multiple of the tensor-parallel size that holds the vocabulary."""
        return -(-self.vocab_size // tp_size) * tp_size

    def check_splits(self, tp_size: int, pp_size: int, vpp_size: int | None) -> None:
        """Raises ConfigError where the heads, the feed-forward width or the layers cannot be split."""
        for what, number in (
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("intermediate_size", self.ffn_hidden_size),
        ):
            if number % tp_size:
                fits = [n for n in range(1, tp_size) if number % n == 0]
                raise ConfigError(
                    f"{what} {number} cannot be split over tensor_model_parallel_size {tp_size}; use one of {fits}"
                )
        stages = pp_size * (vpp_size or 1)
        if self.num_layers % stages:
            raise ConfigError(
                f"{self.num_layers} layers cannot be split over {stages} pipeline stages "
                f"(pipeline {pp_size} x virtual pipeline {vpp_size or 1}); use a divisor of {self.num_layers}"
            )


def read_shape(family: Family, hf_config: Any) -> ModelShape:
    """Read a transformers config (version 4 keeps rope_theta beside rope_scaling, version 5 in rope_parameters)."""
    rope = _rope(hf_config)
    heads = hf_config.num_attention_heads
    if getattr(hf_config, "use_sliding_window", False):
        raise ConfigError("use_sliding_window true is not supported; set it to false in the model's config.json")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf_config, name, False):
            raise ConfigError(
                f"{name} true is not supported: family {family.name} has no such biases here; wanted false"
            )
    if hf_config.hidden_act != "silu":
        raise ConfigError(f"hidden_act {hf_config.hidden_act!r} is not supported; wanted 'silu'")
    return ModelShape(
        family=family,
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        vocab_size=hf_config.vocab_size,
        tied=bool(hf_config.tie_word_embeddings),
        norm_eps=hf_config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling_factor=_llama3_factor(rope),
        max_positions=hf_config.max_position_embeddings,
    )


def _rope(hf_config: Any) -> dict[str, Any]:
    if hasattr(hf_config, "rope_parameters") and hf_config.rope_parameters:
        return dict(hf_config.rope_parameters)
    return {"rope_theta": hf_config.rope_theta, **(hf_config.rope_scaling or {})}


def _llama3_factor(rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    found = {key: rope.get(key) for key in _LLAMA3_SCALING}
    if kind != "llama3" or found != _LLAMA3_SCALING:
        raise ConfigError(
            f"rope_type {kind!r} with {found} is not supported; "
            f"wanted 'default', or 'llama3' with {_LLAMA3_SCALING} (what Megatron-Core computes)"
        )
    return float(rope["factor"])
