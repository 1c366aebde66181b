"""The Megatron model of a Hugging Face config: one `GPTModel` a virtual pipeline stage, with the DAPO head on the last.

`GPTModel` is neither copied nor patched. On CUDA its layers are Transformer Engine's; elsewhere they are Megatron's
local ones with torch's norm and attention (`attention.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.attention import RMSNorm, SDPAttention
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.families.names import Shard, global_name, pieces, sharded_dim
from megatron_dapo.mcore.head import DapoHead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(shape: ModelShape, config: MegatronConfig) -> list[GPTModel]:
    """This rank's model chunks, uninitialised weights, one a virtual pipeline stage. Process groups must be there.

    Raises:
        ConfigError: heads, feed-forward width or layers that the layout cannot split.
    """
    shape.check_splits(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
    )
    transformer = transformer_config(shape, config)
    virtual = config.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else range(virtual)
    return [_build_chunk(shape, transformer, stage) for stage in stages]


def transformer_config(shape: ModelShape, config: MegatronConfig) -> TransformerConfig:
    on_cuda = torch.cuda.is_available()
    dtype = DTYPES[config.params_dtype]
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=on_cuda,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        apply_rope_fusion=on_cuda,
        persist_layer_norm=on_cuda,
        gradient_accumulation_fusion=False,
        # Data-parallel gradients are summed; the loss weights already hold the denominators.
        calculate_per_token_loss=True,
        # Micro-batches are packed to different lengths. Megatron asks for this dispatcher for dense models too.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Between two stages an interleaved pipeline goes both ways at once, and what one message is to its receiver is
        # settled by order alone: Megatron keeps the directions apart where transfers overlap, not in batches.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=on_cuda and not interleaved,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        sequence_parallel=config.sequence_parallel,
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
    )


def _build_chunk(shape: ModelShape, config: TransformerConfig, stage: int | None) -> GPTModel:
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, shape, stage),
        vocab_size=shape.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=last,
        # Torch's attention turns positions itself.
        position_embedding_type="rope" if torch.cuda.is_available() else "none",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]  # Megatron says int and computes with any number
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        share_embeddings_and_output_weights=shape.tied,
        parallel_output=True,
        vp_stage=stage,
    )
    if last:
        DapoHead.install(model.output_layer, shape.vocab_size)
    _mark_sharded(model, shape, config)
    return model.to(torch.cuda.current_device()) if torch.cuda.is_available() else model


def _mark_sharded(model: GPTModel, shape: ModelShape, config: TransformerConfig) -> None:
    """Mark the parameters that tensor parallelism splits.

    Megatron-Core marks them while it initialises them, which is skipped here (weights come from a checkpoint), and
    counts every unmarked parameter once in the gradient norm: the norm would miss all shards but the first.
    """
    for name, param in model.named_parameters():
        dim = sharded_dim(pieces(global_name(name, 0), Shard(shape, 0, config.tensor_model_parallel_size)))
        if dim is not None and not getattr(param, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(param, True, dim, 1)


def _layer_spec(config: TransformerConfig, shape: ModelShape, stage: int | None) -> Any:
    if torch.cuda.is_available():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    inner: Any = layer.submodules
    inner.input_layernorm = inner.pre_mlp_layernorm = RMSNorm
    attention = inner.self_attention.submodules
    attention.core_attention = ModuleSpec(SDPAttention, params={"rotary": _rotary(shape)})
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)  # type: ignore[arg-type]


def _rotary(shape: ModelShape) -> RotaryEmbedding:
    return RotaryEmbedding(
        kv_channels=shape.head_dim,
        rotary_percent=1.0,
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]  # Megatron says int and computes with any number
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        use_cpu_initialization=True,
    )
