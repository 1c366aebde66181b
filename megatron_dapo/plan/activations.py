"""What autograd keeps of a micro-batch until its backward pass, in closed form, and how much more a pass needs at once.

Two kinds of layers (`mcore/model.py`): `torch`, those of a CPU, held against saved-tensor hooks in
`tests/functional/test_plan_memory.py`; and `te`, Transformer Engine's with its flash attention and the fused SwiGLU,
written down from what each of its modules saves and not yet held against a GPU.

Symbols as in Korthikanti et al. (arXiv 2205.05198), for grouped-query attention and SwiGLU: `t` tokens on this
context-parallel rank, `s` those of them that sequence parallelism leaves here, widths by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.fused.softmax import LOGITS_BYTES

Kernels = Literal["torch", "te"]

_F32 = 4
_IDS = 8  # bytes of a token id or a position


@dataclass(frozen=True)
class MicroBatchSize:
    """Of the fullest micro-batch on one context-parallel rank."""

    tokens: int
    response_tokens: int  # those that the head computes
    sequences: int  # packed one after another


@dataclass(frozen=True)
class Saved:
    """Bytes that one micro-batch keeps on a pipeline stage (of one model chunk)."""

    ends: float  # before the first layer and after the last one: token ids; final norm, what the head keeps
    layers: float
    again: float  # the most that recomputing a part of the layers adds, in its backward pass


class LayerSizes:
    """Widths of one layer on one rank, and bytes a token that its parts keep."""

    def __init__(self, shape: ModelShape, config: MegatronConfig, kernels: Kernels):
        tp = config.tensor_model_parallel_size
        self.item = 2 if config.params_dtype == "bfloat16" else 4
        self.share = 1 / tp if config.sequence_parallel else 1.0  # of the tokens, outside tensor-parallel products
        self.hidden, self.heads = shape.hidden_size, shape.num_heads / tp
        self.q = shape.num_heads * shape.head_dim / tp
        self.kv = shape.num_kv_heads * shape.head_dim / tp
        self.kv_heads = shape.num_kv_heads / tp
        self.half = shape.head_dim / 2
        self.ffn = shape.ffn_hidden_size / tp
        self.qk_norm = shape.family.qk_norm
        self.cp = config.context_parallel_size
        self.kernels = kernels

    @property
    def input(self) -> float:
        return self.share * self.hidden * self.item

    @property
    def norm(self) -> float:
        """Of a norm before a product: its input, the reciprocal of its root mean square, its output.

        torch also keeps the normalised values before the weight; in bfloat16 it keeps these and the input in float32.
        """
        wide = 2 * _F32 if self.kernels == "torch" else self.item
        return self.share * (self.hidden * (wide + self.item) + _F32)

    @property
    def head_norms(self) -> float:
        """Of the norms of queries and keys, where the family has them."""
        if not self.qk_norm:
            return 0.0
        wide = 2 * _F32 if self.kernels == "torch" else self.item
        return (self.q + self.kv) * wide + (self.heads + self.kv_heads) * _F32

    def core(self, size: MicroBatchSize) -> float:
        """Of attention between its two products, the output included: that is the second product's input."""
        qkv, lse = self.q + 2 * self.kv, self.heads * _F32
        if self.kernels == "te":
            return (qkv + self.q) * self.item + lse
        joined = self.q if size.sequences > 1 else 0  # the sequences' outputs are put together
        angles = 2 * self.half
        if self.cp > 1:  # keys and values of all ranks, in the order of the sequence
            mask = size.tokens * self.cp / size.sequences * _F32  # sequences of one length are assumed
            return (self.q + 2 * self.cp * self.kv + self.q + joined + angles) * self.item + lse + mask
        return (
            self.q + self.kv + qkv + self.q + joined + angles
        ) * self.item + lse  # values lie in the product's output

    @property
    def core_recomputed(self) -> float:
        """What is left of `core` where it is recomputed: its inputs and its output."""
        if self.kernels == "te":
            return (2 * self.q + 2 * self.kv) * self.item
        return (self.q + self.q + 2 * self.kv + self.q) * self.item

    @property
    def mlp(self) -> float:
        """Gate and up, and the second product's input; torch keeps the activated gate and a copy of up as well."""
        return self.ffn * (5 if self.kernels == "torch" else 3) * self.item

    def layer(self, size: MicroBatchSize, selective: bool = False) -> float:
        core = self.core_recomputed if selective else self.core(size)
        return 2 * self.norm + self.head_norms + core + self.mlp


def saved_by_chunk(
    shape: ModelShape, config: MegatronConfig, kernels: Kernels, size: MicroBatchSize, first: bool, last: bool
) -> Saved:
    """Of a chunk of layers: one a stage, or `virtual_pipeline_model_parallel_size` of them."""
    sizes, t = LayerSizes(shape, config, kernels), size.tokens
    count = layers_per_chunk(shape, config)
    whole = t * sizes.layer(size)
    ends = t * _IDS if first else 0.0
    if last:
        final = sizes.norm - sizes.share * sizes.hidden * sizes.item  # its output is kept by nobody
        ends += t * final + size.response_tokens * (_IDS + sizes.hidden * sizes.item)
    if config.recompute_granularity == "full":
        number = min(config.recompute_num_layers or 1, count)
        if config.recompute_method == "block":  # so many layers by themselves, the others are kept
            kept = (count - number) * whole  # the last ones, which are through when the first is recomputed
            return Saved(ends, number * t * sizes.input + kept, whole - kept)
        return Saved(ends, -(-count // number) * t * sizes.input, number * whole)
    if config.recompute_granularity == "selective":
        core = t * (sizes.core(size) - (sizes.q * sizes.item))
        return Saved(ends, count * t * sizes.layer(size, selective=True), core)
    return Saved(ends, count * whole, 0.0)


def layers_per_chunk(shape: ModelShape, config: MegatronConfig) -> int:
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    return shape.num_layers // chunks


def chunks_in_flight(config: MegatronConfig, stage: int, micro_batches: int) -> int:
    """Forward passes of a chunk on `stage` whose backward pass is still to come, at most.

    Megatron's schedules: 1F1B warms up with one micro-batch for each stage behind; interleaved with two, and with
    one round of all stages for each chunk but the last (arXiv 2104.04473, section 2.2).
    """
    stages = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is None:
        return min(micro_batches, stages - stage)
    total = micro_batches * virtual
    return total if micro_batches == stages else min(total, 2 * (stages - stage - 1) + (virtual - 1) * stages + 1)


def saved_peak(
    shape: ModelShape, config: MegatronConfig, kernels: Kernels, size: MicroBatchSize, stage: int, micro_batches: int
) -> float:
    """Bytes that autograd keeps on pipeline stage `stage` at the worst moment of an update."""
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    first, last = stage == 0, stage == stages - 1
    plain = saved_by_chunk(shape, config, kernels, size, False, False)
    count = chunks_in_flight(config, stage, micro_batches)
    with_ends = saved_by_chunk(shape, config, kernels, size, first, last)
    # Of an interleaved stage only its first or last chunk has an end; as many of them as of each other chunk.
    ends = -(-count // virtual) if virtual > 1 else count
    kept = count * plain.layers + ends * with_ends.ends
    # What is recomputed comes when the head and the final norm of that micro-batch are done with.
    head = with_ends.ends if last else 0.0
    return max(kept, kept - head + plain.again)


def working_bytes(shape: ModelShape, config: MegatronConfig, size: MicroBatchSize) -> float:
    """What a layer's backward pass needs beside what is kept: gathered input, gradients of the widest values."""
    sizes = LayerSizes(shape, config, "te")
    return size.tokens * (3 * sizes.ffn + 2 * sizes.hidden) * sizes.item


def forward_bytes(shape: ModelShape, config: MegatronConfig, size: MicroBatchSize) -> float:
    """What a pass without gradients holds at once: hidden states, and the widest values of a layer."""
    sizes = LayerSizes(shape, config, "te")
    return size.tokens * (3 * sizes.ffn + 3 * sizes.hidden) * sizes.item


def head_bytes(shape: ModelShape, config: MegatronConfig, size: MicroBatchSize, with_gradient: bool) -> float:
    """The fused loss's workspace on CUDA: logits of a chunk in float32, and hidden states (`mcore/head.py`).

    Gathered over sequence parallelism, chosen, and with a gradient as many again on the way back.
    """
    sizes = LayerSizes(shape, config, "te")
    rows = shape.padded_vocab_size(config.tensor_model_parallel_size) / config.tensor_model_parallel_size
    logits = min(LOGITS_BYTES["cuda"], size.response_tokens * rows * _F32)
    states = (size.tokens + size.response_tokens) * sizes.hidden * sizes.item
    return logits + states * (2 if with_gradient else 1)
