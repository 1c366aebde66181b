"""Who holds what, and who wants what: rectangles of Hugging Face tensors.

The trainer's side comes from the one table of names (`mcore/families/names.py`). The engine's is the column/row split
that SGLang and vLLM share: query heads, gate, up and vocabulary by rows, the attention output and down projection by
columns, norms whole; where an engine has more ranks than key/value heads, neighbours hold the same head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_dapo.mcore.families.dense import ModelShape
from megatron_dapo.mcore.families.names import Shard, hf_shapes, pieces, stage_parameters

Span = tuple[int, int]  # from, up to
_VOCAB_MULTIPLE = 64  # engines pad the vocabulary to it before they cut it


@dataclass(frozen=True, slots=True)
class Region:
    """Rows and columns of the tensor `name`. A one-dimensional tensor is one column."""

    name: str
    rows: Span
    cols: Span

    @property
    def count(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])

    def contains(self, other: Region) -> bool:
        """Of the same tensor."""
        return (
            self.rows[0] <= other.rows[0]
            and other.rows[1] <= self.rows[1]
            and self.cols[0] <= other.cols[0]
            and other.cols[1] <= self.cols[1]
        )

    def index(self, dims: int, origin: Region | None = None) -> tuple[slice, ...]:
        """Into the whole tensor, or into what holds `origin` of it."""
        row, col = (0, 0) if origin is None else (origin.rows[0], origin.cols[0])
        rows, cols = slice(self.rows[0] - row, self.rows[1] - row), slice(self.cols[0] - col, self.cols[1] - col)
        return (rows, cols)[:dims]


def matrix_shape(dims: Sequence[int]) -> tuple[int, int]:
    return (dims[0], dims[1] if len(dims) == 2 else 1)


def held_regions(
    shape: ModelShape, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int, vpp_size: int | None
) -> list[Region]:
    """What a rank of the trainer holds; padding of the vocabulary is nobody's."""
    dims = hf_shapes(shape)
    shard = Shard(shape, tp_rank, tp_size)
    names = stage_parameters(shape, pp_rank, pp_size, vpp_size)
    found = (
        region_of(piece.hf_name, piece.hf_rows, piece.hf_cols, dims[piece.hf_name])
        for name in names
        for piece in pieces(name, shard)
    )
    return _distinct(found)


def wanted_regions(shape: ModelShape, tp_rank: int, tp_size: int) -> list[Region]:
    """What rank `tp_rank` of an engine holds.

    Raises:
        ValueError: heads or the feed-forward width cannot be split so.
    """
    _check_engine_split(shape, tp_size)
    head = shape.head_dim
    heads, kv = shape.num_heads // tp_size, max(1, shape.num_kv_heads // tp_size)
    kv_first = tp_rank * shape.num_kv_heads // tp_size
    q, k = _cut(tp_rank, heads * head), (kv_first * head, (kv_first + kv) * head)
    width = _cut(tp_rank, shape.ffn_hidden_size // tp_size)
    padded = -(-shape.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    first, end = _cut(tp_rank, -(-padded // tp_size))
    vocab = min(first, shape.vocab_size), min(end, shape.vocab_size)
    rows = {"q_proj": q, "k_proj": k, "v_proj": k, "gate_proj": width, "up_proj": width}
    rows |= {"embed_tokens": vocab, "lm_head": vocab}
    cols = {"o_proj": q, "down_proj": width}
    found = []
    for name, dims in hf_shapes(shape).items():
        kind, (height, breadth) = name.split(".")[-2], matrix_shape(dims)
        found.append(Region(name, rows.get(kind, (0, height)), cols.get(kind, (0, breadth))))
    return _distinct(found)


def region_of(name: str, rows: slice, cols: slice, dims: Sequence[int]) -> Region:
    """From slices that may be open."""
    height, breadth = matrix_shape(dims)
    return Region(name, rows.indices(height)[:2], cols.indices(breadth)[:2])


def _distinct(regions: Iterable[Region]) -> list[Region]:
    return list(dict.fromkeys(region for region in regions if region.count))


def _cut(rank: int, size: int) -> Span:
    return rank * size, (rank + 1) * size


def _check_engine_split(shape: ModelShape, tp_size: int) -> None:
    for what, number in (("num_attention_heads", shape.num_heads), ("intermediate_size", shape.ffn_hidden_size)):
        if number % tp_size:
            raise ValueError(f"{what} {number} cannot be split over an engine's {tp_size} ranks; use a divisor of it")
    if shape.num_kv_heads % tp_size and tp_size % shape.num_kv_heads:
        raise ValueError(
            f"num_key_value_heads {shape.num_kv_heads} neither divides nor is divided by an engine's {tp_size} ranks; "
            "use another tensor-parallel size for it"
        )
