"""Megatron's parameters under Hugging Face's names: one table, both ways, as slices.

A tensor-parallel shard of a Megatron parameter is made of rectangles of Hugging Face tensors. `pieces` lists them;
loading copies each rectangle in, exporting copies it out, and a reshard plan can intersect two such lists. Nothing
is ever assembled in full to be cut again.

Megatron keeps q, k and v of each key/value group together (rows: the group's query heads, its key head, its value
head), gate above up in the feed-forward, and pads the vocabulary to a multiple of the tensor-parallel size.
The local layer spec has separate norm weights; Transformer Engine's fuses them into the layer behind: both names
are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_dapo.mcore.families.dense import ModelShape

_ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """`local[local_rows, local_cols]` is `hf_name[hf_rows, hf_cols]`; one-dimensional tensors have rows alone."""

    hf_name: str
    hf_rows: slice
    local_rows: slice
    hf_cols: slice = field(default_factory=lambda: _ALL)

    def hf_index(self, dims: int) -> tuple[slice, ...]:
        return (self.hf_rows, self.hf_cols)[:dims]

    def local_index(self, dims: int) -> tuple[slice, ...]:
        return (self.local_rows, _ALL)[:dims]


@dataclass(frozen=True)
class Shard:
    """Which tensor-parallel slice of the model is meant."""

    shape: ModelShape
    tp_rank: int
    tp_size: int


# Megatron's name within a layer -> the Hugging Face names within a layer, and how the rows lie.
_Layout = Callable[[Shard, tuple[str, ...]], list[Piece]]


def pieces(name: str, shard: Shard) -> list[Piece]:
    """The rectangles of Hugging Face tensors that make up this shard of the parameter `name`.

    `name` is Megatron's, with the layer's number counted over the whole model (`global_name`).

    Raises:
        KeyError: the table does not know the name.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        if name == "output_layer.weight" and shard.shape.tied:  # the last pipeline stage's copy of the embedding
            name = "embedding.word_embeddings.weight"
        hf_names, layout = _MODEL[name]
        return layout(shard, hf_names)
    number, inner = match.groups()
    hf_names, layout = _LAYER[inner]
    return layout(shard, tuple(f"model.layers.{number}.{hf}" for hf in hf_names))


def sharded_dim(found: list[Piece]) -> int | None:
    """The dimension that tensor parallelism splits; None where every rank holds the whole parameter."""
    if any(piece.hf_cols != _ALL for piece in found):
        return 1
    return 0 if any(piece.hf_rows != _ALL for piece in found) else None


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape, in the checkpoint's order."""
    hidden, width, dim = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    q, kv = shape.num_heads * dim, shape.num_kv_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }
    if shape.family.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if shape.family.qk_norm:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for number in range(shape.num_layers):
        shapes |= {f"model.layers.{number}.{name}": dims for name, dims in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    return shapes


def megatron_names(shape: ModelShape) -> list[str]:
    """Every parameter of the model, layer by layer; norms under their fused names.

    Megatron's checkpoints hold these names for both layer specs: the local one maps its own to them when it saves.
    """
    inner = _inner_names(shape, without=_LOCAL_NORMS)
    layers = [f"decoder.layers.{number}.{name}" for number in range(shape.num_layers) for name in inner]
    names = ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight"]
    return names + ([] if shape.tied else ["output_layer.weight"])


def stage_parameters(shape: ModelShape, pp_rank: int, pp_size: int, vpp_size: int | None = None) -> list[str]:
    """The parameters on a pipeline stage, layers counted over the whole model; norms under the local spec's names.

    Interleaved stages (`vpp_size` chunks each) hold every pp_size-th run of layers. A tied embedding is on the last
    stage too, as `output_layer.weight`, where the model has more than one stage.
    """
    chunks = vpp_size or 1
    depth = shape.num_layers // (pp_size * chunks)
    layers = [(chunk * pp_size + pp_rank) * depth + i for chunk in range(chunks) for i in range(depth)]
    inner = _inner_names(shape, without=_FUSED_NORMS)
    found = ["embedding.word_embeddings.weight"] if pp_rank == 0 else []
    found += [f"decoder.layers.{layer}.{name}" for layer in layers for name in inner]
    if pp_rank == pp_size - 1:
        found.append("decoder.final_layernorm.weight")
        found += [] if shape.tied and pp_size == 1 else ["output_layer.weight"]
    return found


def _inner_names(shape: ModelShape, without: frozenset[str]) -> list[str]:
    """Of a layer's parameters, those that the family has."""
    absent = without if shape.family.qkv_bias else without | {"self_attention.linear_qkv.bias"}
    if not shape.family.qk_norm:
        absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    return [name for name in _LAYER if name not in absent]


def global_name(name: str, layer_offset: int) -> str:
    """Megatron counts layers from 0 on each pipeline stage; here from 0 over the model. DDP's `module.` is cut."""
    name = name.removeprefix("module.")
    return re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + layer_offset}", name)


def _whole(shard: Shard, hf: tuple[str, ...]) -> list[Piece]:
    return [Piece(hf[0], _ALL, _ALL)]


def _vocab(shard: Shard, hf: tuple[str, ...]) -> list[Piece]:
    rows = shard.shape.padded_vocab_size(shard.tp_size) // shard.tp_size
    start = shard.tp_rank * rows
    stop = max(start, min(start + rows, shard.shape.vocab_size))
    return [Piece(hf[0], slice(start, stop), slice(0, stop - start))]


def _columns(size: Callable[[ModelShape], int]) -> _Layout:
    def layout(shard: Shard, hf: tuple[str, ...]) -> list[Piece]:
        width = size(shard.shape) // shard.tp_size
        return [Piece(hf[0], _ALL, _ALL, slice(shard.tp_rank * width, (shard.tp_rank + 1) * width))]

    return layout


def _gate_up(shard: Shard, hf: tuple[str, ...]) -> list[Piece]:
    rows = shard.shape.ffn_hidden_size // shard.tp_size
    source = slice(shard.tp_rank * rows, (shard.tp_rank + 1) * rows)
    return [Piece(name, source, slice(i * rows, (i + 1) * rows)) for i, name in enumerate(hf)]


def _qkv(shard: Shard, hf: tuple[str, ...]) -> list[Piece]:
    shape = shard.shape
    dim, q_rows = shape.head_dim, shape.heads_per_group * shape.head_dim
    groups = shape.num_kv_heads // shard.tp_size
    found = []
    for local in range(groups):
        group, row = shard.tp_rank * groups + local, local * (q_rows + 2 * dim)
        for name, height in zip(hf, (q_rows, dim, dim), strict=True):
            found.append(Piece(name, slice(group * height, (group + 1) * height), slice(row, row + height)))
            row += height
    return found


_Q_SIZE = _columns(lambda shape: shape.num_heads * shape.head_dim)
_FFN_SIZE = _columns(lambda shape: shape.ffn_hidden_size)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LOCAL_NORMS = frozenset({"input_layernorm.weight", "pre_mlp_layernorm.weight"})
_FUSED_NORMS = frozenset({"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"})
_INPUT_NORM = (("input_layernorm.weight",), _whole)
_MLP_NORM = (("post_attention_layernorm.weight",), _whole)

_MODEL: dict[str, tuple[tuple[str, ...], _Layout]] = {
    "embedding.word_embeddings.weight": (("model.embed_tokens.weight",), _vocab),
    "decoder.final_layernorm.weight": (("model.norm.weight",), _whole),
    "output_layer.weight": (("lm_head.weight",), _vocab),
}
_LAYER: dict[str, tuple[tuple[str, ...], _Layout]] = {
    "input_layernorm.weight": _INPUT_NORM,
    "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
    "self_attention.linear_qkv.weight": (tuple(f"{name}.weight" for name in _QKV), _qkv),
    "self_attention.linear_qkv.bias": (tuple(f"{name}.bias" for name in _QKV), _qkv),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), _whole),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), _whole),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), _Q_SIZE),
    "pre_mlp_layernorm.weight": _MLP_NORM,
    "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), _gate_up),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), _FFN_SIZE),
}
