"""The table of names and slices: nothing is lost or doubled, and another project's converter agrees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_dapo.mcore.families import FAMILIES, ModelShape
from megatron_dapo.mcore.families.names import (
    Piece,
    Shard,
    global_name,
    hf_shapes,
    megatron_names,
    pieces,
    sharded_dim,
    stage_parameters,
)
from tests.unit.mcore.helpers import FUSED_NORMS, SHAPE, local_shapes


@st.composite
def splits(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A shape that `tp_size` can split; its vocabulary need not be a multiple, or can be smaller than that."""
    tp_size = draw(st.sampled_from([1, 2, 4]))
    kv_heads = tp_size * draw(st.integers(1, 3))
    shape = ModelShape(
        family=FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))],
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=tp_size * draw(st.integers(1, 4)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 23)),
        tied=draw(st.booleans()),
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling_factor=None,
        max_positions=8,
    )
    return shape, tp_size


@given(splits(), st.booleans())
@example((replace(SHAPE, vocab_size=5), 4), False)  # the last rank's rows are all padding
@settings(max_examples=60)
def test_every_element_of_the_checkpoint_and_of_every_shard_is_in_exactly_one_piece(
    split: tuple[ModelShape, int], fused_norms: bool
):
    shape, tp_size = split
    hf_counts = {name: np.zeros(dims, int) for name, dims in hf_shapes(shape).items()}
    copies = dict.fromkeys(hf_counts, 1)  # ranks that hold a tensor whole
    for tp_rank in range(tp_size):
        for name, dims in local_shapes(shape, tp_size, fused_norms).items():
            found = pieces(name, Shard(shape, tp_rank, tp_size))
            local_counts = np.zeros(dims, int)
            for piece in found:
                hf, local = piece.hf_index(len(dims)), piece.local_index(len(dims))
                assert hf_counts[piece.hf_name][hf].shape == local_counts[local].shape, (name, piece)
                hf_counts[piece.hf_name][hf] += 1
                local_counts[local] += 1
                if sharded_dim(found) is None:
                    copies[piece.hf_name] = tp_size
            real = real_rows(name, dims, shape, tp_rank)
            assert (local_counts[:real] == 1).all(), name
            assert (local_counts[real:] == 0).all(), name
    for name, counts in hf_counts.items():
        assert (counts == copies[name]).all(), name


def real_rows(name: str, dims: tuple[int, ...], shape: ModelShape, tp_rank: int) -> int:
    """Rows that are not padding of the vocabulary."""
    if name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return dims[0]
    return min(max(shape.vocab_size - tp_rank * dims[0], 0), dims[0])


def test_only_norms_are_held_whole_by_every_rank():
    for family in FAMILIES.values():
        shape = replace(SHAPE, family=family)
        for name in local_shapes(shape, 2, fused_norms=True):
            whole = sharded_dim(pieces(name, Shard(shape, 0, 2))) is None
            assert whole == ("norm" in name), name


@pytest.mark.parametrize("fused", FUSED_NORMS.values())
def test_fused_norms_are_the_same_tensors_as_separate_ones(fused: str):
    separate = {fused: name for name, fused in FUSED_NORMS.items()}[fused]
    shard = Shard(SHAPE, 1, 2)
    assert pieces(f"decoder.layers.1.{fused}", shard) == pieces(f"decoder.layers.1.{separate}", shard)


def test_query_key_and_value_rows_lie_group_by_group():
    shape = replace(SHAPE, num_heads=4, num_kv_heads=2, head_dim=3)
    assert [(p.hf_name[-13:], p.hf_rows, p.local_rows) for p in qkv_pieces(Shard(shape, 0, 1))] == [
        ("q_proj.weight", slice(0, 6), slice(0, 6)),
        ("k_proj.weight", slice(0, 3), slice(6, 9)),
        ("v_proj.weight", slice(0, 3), slice(9, 12)),
        ("q_proj.weight", slice(6, 12), slice(12, 18)),
        ("k_proj.weight", slice(3, 6), slice(18, 21)),
        ("v_proj.weight", slice(3, 6), slice(21, 24)),
    ]
    wider = qkv_pieces(Shard(replace(shape, num_heads=8, num_kv_heads=4), 1, 2))
    q, k = [p.hf_rows for p in wider[::3]], [p.hf_rows for p in wider[1::3]]
    assert (q, k) == ([slice(12, 18), slice(18, 24)], [slice(6, 9), slice(9, 12)])
    assert [p.local_rows for p in wider[:3]] == [slice(0, 6), slice(6, 9), slice(9, 12)]


def qkv_pieces(shard: Shard) -> list[Piece]:
    return pieces("decoder.layers.0.self_attention.linear_qkv.weight", shard)


def test_the_output_layer_of_a_tied_model_is_its_embedding():
    tied, untied = replace(SHAPE, tied=True), SHAPE
    (piece,) = pieces("output_layer.weight", Shard(tied, 1, 2))
    assert piece == pieces("embedding.word_embeddings.weight", Shard(tied, 1, 2))[0]
    assert "lm_head.weight" not in hf_shapes(tied)
    assert pieces("output_layer.weight", Shard(untied, 1, 2))[0].hf_name == "lm_head.weight"


def test_layers_are_counted_over_the_whole_model():
    assert global_name("module.decoder.layers.1.mlp.linear_fc2.weight", 4) == "decoder.layers.5.mlp.linear_fc2.weight"
    assert global_name("output_layer.weight", 4) == "output_layer.weight"


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "embedding.position_embeddings.weight"])
def test_an_unknown_parameter_is_refused(name: str):
    with pytest.raises(KeyError):
        pieces(name, Shard(SHAPE, 0, 1))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_checkpoint_names_and_shapes_are_those_of_transformers(family: str):
    for tied in (False, True):
        config = hf_config(family, tied)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        wanted = {name: tuple(param.shape) for name, param in model.named_parameters()}
        found = hf_shapes(replace(SHAPE_OF_CONFIG, family=FAMILIES[family], tied=tied))
        assert found == wanted


SHAPE_OF_CONFIG = replace(SHAPE, hidden_size=16, num_heads=8, num_kv_heads=4, head_dim=4, vocab_size=12)


def hf_config(family: str, tied: bool) -> transformers.PreTrainedConfig:
    shape = SHAPE_OF_CONFIG
    return transformers.AutoConfig.for_model(
        family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_mbridge_cuts_the_same_shards(family: str, tp_size: int):
    pytest.importorskip(
        "mbridge", reason="mbridge, the oracle of the conversion, is not installed", exc_type=ImportError
    )
    from mbridge import AutoBridge
    from mbridge.core.parallel_states import ParallelStates

    states = ParallelStates(tp_size=tp_size, vpp_size=None)
    bridge = AutoBridge.from_config(hf_config(family, tied=False), parallel_states=states, dtype=torch.float32)
    shape = replace(SHAPE_OF_CONFIG, family=FAMILIES[family])
    tensors = {name: torch.randn(dims) for name, dims in hf_shapes(shape).items()}
    for name, dims in local_shapes(shape, tp_size, fused_norms=True).items():
        merged = bridge._weight_to_mcore_format(
            name, [tensors[hf] for hf in bridge._weight_name_mapping_mcore_to_hf(name)]
        )
        wanted = bridge._weight_split_across_tp(name, merged, torch.empty(dims), tp_size)
        for tp_rank in range(tp_size):
            local = torch.full(dims, torch.nan)
            for piece in pieces(name, Shard(shape, tp_rank, tp_size)):
                local[piece.local_index(len(dims))] = tensors[piece.hf_name][piece.hf_index(len(dims))]
            assert torch.equal(local, wanted[tp_rank]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_names_of_a_model_are_those_of_its_parameters(family: str, tied: bool):
    shape = replace(SHAPE, family=FAMILIES[family], tied=tied)
    assert sorted(megatron_names(shape)) == sorted(local_shapes(shape, 1, fused_norms=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_parameters_of_all_stages_are_the_models(family: str, tied: bool):
    shape = replace(SHAPE, family=FAMILIES[family], tied=tied, num_layers=8)
    wanted = set(local_shapes(shape, 1, fused_norms=False))
    assert set(stage_parameters(shape, 0, 1)) == wanted
    for pp_size, vpp_size in ((2, None), (4, 2), (2, 4)):
        stages = [stage_parameters(shape, rank, pp_size, vpp_size) for rank in range(pp_size)]
        listed = [name for stage in stages for name in stage]
        copies = ["output_layer.weight"] if tied else []  # the last stage's copy of the embedding
        assert sorted(listed) == sorted([*wanted, *copies])
        assert "embedding.word_embeddings.weight" in stages[0]
        assert "output_layer.weight" in stages[-1]


def test_interleaved_stages_take_turns_at_runs_of_layers():
    shape = replace(SHAPE, num_layers=8)
    norms = [name for name in stage_parameters(shape, 1, 2, 2) if name.endswith("pre_mlp_layernorm.weight")]
    assert [int(name.split(".")[2]) for name in norms] == [2, 3, 6, 7]
