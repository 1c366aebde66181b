"""A checkpoint's tensors as parts of the parameters that engines keep them in, on one rank and on several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dapo.algo.checksum import checksum
from megatron_dapo.rollout.held_tensors import EngineRank, checkpoint_slices, rank_checksums, whole_checksums

HEAD_DIM, HEADS = 3, 8
ALONE = EngineRank(0, 1, HEAD_DIM)


def checkpoint(kv_heads: int) -> dict[str, Tensor]:
    """A layer's and the model's tensors, of 8 heads; gate and up have 16 rows, the vocabulary has 21."""
    q, kv = HEADS * HEAD_DIM, kv_heads * HEAD_DIM
    shapes = {
        "l.q_proj.weight": (q, 6),
        "l.k_proj.weight": (kv, 6),
        "l.v_proj.weight": (kv, 6),
        "l.q_proj.bias": (q,),
        "l.k_proj.bias": (kv,),
        "l.v_proj.bias": (kv,),
        "l.o_proj.weight": (6, q),
        "l.gate_proj.weight": (16, 6),
        "l.up_proj.weight": (16, 6),
        "l.down_proj.weight": (6, 16),
        "l.norm.weight": (6,),
        "model.embed_tokens.weight": (21, 6),
        "lm_head.weight": (21, 6),
    }
    random = torch.Generator().manual_seed(kv_heads)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def as_engine(tensors: dict[str, Tensor], rank: int, size: int, kv_heads: int) -> dict[str, Tensor]:
    """What rank `rank` of an engine over `size` ranks holds, cut by hand; gate, up and vocabulary are padded."""

    def even(name: str, dim: int = 0) -> Tensor:
        return tensors[name].chunk(size, dim)[rank]

    def key_value(name: str) -> Tensor:
        heads = tensors[name].unflatten(0, (kv_heads, HEAD_DIM))
        repeated = heads.repeat_interleave(max(1, size // kv_heads), 0)
        return repeated.chunk(size)[rank].flatten(0, 1)

    def padded(tensor: Tensor, rows: int) -> Tensor:
        return torch.cat([tensor, torch.full((rows - len(tensor), 6), 7.0)])

    fused = {
        f"l.qkv_proj.{kind}": torch.cat(
            [even(f"l.q_proj.{kind}"), key_value(f"l.k_proj.{kind}"), key_value(f"l.v_proj.{kind}")]
        )
        for kind in ("weight", "bias")
    }
    gate_up = [padded(even(f"l.{name}_proj.weight"), 16 // size + 1) for name in ("gate", "up")]
    return fused | {
        "l.gate_up_proj.weight": torch.cat(gate_up),
        "l.o_proj.weight": even("l.o_proj.weight", 1),
        "l.down_proj.weight": even("l.down_proj.weight", 1),
        "l.norm.weight": tensors["l.norm.weight"],
        "model.embed_tokens.weight": padded(tensors["model.embed_tokens.weight"], 64).chunk(size)[rank],
        "lm_head.weight": padded(tensors["lm_head.weight"], 64).chunk(size)[rank],
    }


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_ranks_parts_add_up_to_the_checksums_of_the_checkpoint(size: int, kv_heads: int) -> None:
    tensors = checkpoint(kv_heads)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    parts = [
        rank_checksums(as_engine(tensors, rank, size, kv_heads), shapes, EngineRank(rank, size, HEAD_DIM))
        for rank in range(size)
    ]
    assert whole_checksums(parts) == {name: checksum(tensor) for name, tensor in tensors.items()}


def test_on_one_rank_each_tensor_is_found_whole_and_without_padding() -> None:
    tensors = checkpoint(2)
    found = checkpoint_slices(as_engine(tensors, 0, 1, 2), {name: t.shape for name, t in tensors.items()}, ALONE)
    for each in found:
        assert torch.equal(each.tensor, tensors[each.name]), each.name
        assert (each.first_row, each.first_column) == (0, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_changed_element_on_any_rank_changes_its_tensors_checksum_alone(rank: int) -> None:
    tensors = checkpoint(2)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    held = [as_engine(tensors, each, 2, 2) for each in range(2)]
    held[rank]["l.qkv_proj.weight"][13, 2] += 1  # rows 0 to 11 are queries', 12 to 14 keys'
    found = whole_checksums(rank_checksums(each, shapes, EngineRank(n, 2, HEAD_DIM)) for n, each in enumerate(held))
    assert [name for name, tensor in tensors.items() if found[name] != checksum(tensor)] == ["l.k_proj.weight"]


def test_a_tensor_that_the_engine_lacks_is_named() -> None:
    with pytest.raises(KeyError, match=r"norm\.weight"):
        rank_checksums({}, {"l.norm.weight": [3]}, ALONE)
