"""What each side holds, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.sync.regions import Region, held_regions, wanted_regions
from tests.unit.sync.layouts import model_shape

ATTENTION = "model.layers.0.self_attn"


def wanted(tp_rank: int, tp_size: int, **changes: object) -> dict[str, Region]:
    return {region.name: region for region in wanted_regions(model_shape(**changes), tp_rank, tp_size)}


def test_an_engine_of_one_rank_wants_whole_tensors():
    found = wanted(0, 1)
    assert {name: (r.rows, r.cols) for name, r in found.items()} == {
        name: ((0, dims[0]), (0, dims[1] if len(dims) == 2 else 1)) for name, dims in hf_shapes(model_shape()).items()
    }


def test_the_second_of_two_engine_ranks_wants_the_second_halves():
    found = wanted(1, 2)
    assert found[f"{ATTENTION}.q_proj.weight"] == Region(f"{ATTENTION}.q_proj.weight", (8, 16), (0, 6))
    assert found[f"{ATTENTION}.k_proj.bias"].rows == (4, 8)
    assert found[f"{ATTENTION}.o_proj.weight"] == Region(f"{ATTENTION}.o_proj.weight", (0, 6), (8, 16))
    assert found["model.layers.0.mlp.up_proj.weight"].rows == (4, 8)
    assert found["model.layers.0.mlp.down_proj.weight"].cols == (4, 8)
    assert found["model.norm.weight"].rows == (0, 6)


def test_engine_ranks_beyond_the_key_value_heads_share_them():
    rows = [wanted(rank, 8)[f"{ATTENTION}.k_proj.weight"].rows for rank in range(8)]
    assert rows == [(0, 2), (0, 2), (2, 4), (2, 4), (4, 6), (4, 6), (6, 8), (6, 8)]


def test_the_vocabulary_is_padded_to_64_before_an_engine_cuts_it():
    name = "model.embed_tokens.weight"
    found = [wanted(rank, 4, vocab_size=130).get(name) for rank in range(4)]  # 192 rows, 48 to a rank
    assert [region and region.rows for region in found] == [(0, 48), (48, 96), (96, 130), None]


@pytest.mark.parametrize(
    "changes, tp_size, message",
    [
        ({}, 3, "num_attention_heads 8 cannot be split over an engine's 3 ranks"),
        ({"ffn_hidden_size": 6}, 4, "intermediate_size 6 cannot be split over an engine's 4 ranks"),
        ({"num_heads": 24, "num_kv_heads": 6, "ffn_hidden_size": 12}, 4, "num_key_value_heads 6 neither divides nor"),
    ],
)
def test_a_layout_that_an_engine_cannot_have_is_refused(changes: dict[str, int], tp_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        wanted(0, tp_size, **changes)


def test_a_tied_embedding_is_on_the_first_and_on_the_last_stage():
    name = "model.embed_tokens.weight"
    for tied in (True, False):
        stages = [
            {r.name: r.rows for r in held_regions(model_shape(tied=tied, num_layers=4), 0, 2, stage, 4, None)}
            for stage in range(4)
        ]
        assert [stage.get(name) for stage in stages] == [(0, 6), None, None, (0, 6) if tied else None]
        assert [stage.get("lm_head.weight") for stage in stages] == [None, None, None, None if tied else (0, 6)]


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(1, None), (2, None), (2, 2)]),
    st.booleans(),
    st.sampled_from([5, 11, 64]),
)
@settings(max_examples=40)
def test_the_ranks_of_one_replica_hold_the_model(tp: int, stages: tuple[int, int | None], tied: bool, vocab: int):
    pp, vpp = stages
    shape = model_shape(tied=tied, vocab_size=vocab, num_layers=4)
    counts = {name: np.zeros(dims, int) for name, dims in hf_shapes(shape).items()}
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            for region in held_regions(shape, tp_rank, tp, pp_rank, pp, vpp):
                counts[region.name][region.index(counts[region.name].ndim)] += 1
    for name, count in counts.items():
        times = tp if name.endswith("norm.weight") else 1
        times *= 2 if tied and pp > 1 and name == "model.embed_tokens.weight" else 1
        assert (count == times).all(), name


def test_an_index_into_a_slice_counts_from_where_the_slice_begins():
    whole = np.arange(48).reshape(8, 6)
    held, inner = Region("w", (2, 8), (1, 6)), Region("w", (4, 6), (2, 5))
    assert held.contains(inner)
    assert not inner.contains(held)
    assert (whole[held.index(2)][inner.index(2, held)] == whole[inner.index(2)]).all()
