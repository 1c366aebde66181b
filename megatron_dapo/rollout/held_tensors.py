"""A checkpoint's tensors in an engine, which keeps some of them as one and splits most over its ranks.

SGLang and vLLM do so in the same way for dense models: Megatron's way. Queries, keys, values, gate and up are split by
rows, heads whole; output and down projections by columns; embedding and output layer by rows of a padded vocabulary;
the rest is on every rank. Where there are fewer key-value heads than ranks, neighbours hold the same head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_dapo.algo.checksum import add_checksums, checksum

# The engine's parameter that holds several of a checkpoint, in this order.
FUSED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EQUAL_PARTS = ("gate_up_proj",)  # each padded to the same size by itself, if at all
BY_ROWS = ("q_proj", "gate_proj", "up_proj")
BY_HEADS = ("k_proj", "v_proj")
BY_COLUMNS = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class EngineRank:
    """One of `size` ranks of an engine over several devices; `head_dim` is the model's."""

    rank: int
    size: int
    head_dim: int

    def rows(self, leaf: str, total: int, held: int) -> range:
        """Of `total` rows of a checkpoint's tensor, those here; `held`: rows of the parameter that holds them."""
        if leaf in BY_ROWS:
            return self._even(total)
        if leaf in BY_HEADS:
            heads = total // self.head_dim
            if heads >= self.size:
                return self._even(total)
            head = self.rank * heads // self.size
            return range(head * self.head_dim, (head + 1) * self.head_dim)
        if leaf in VOCABULARY:
            return range(min(self.rank * held, total), min((self.rank + 1) * held, total))
        return range(total)

    def columns(self, leaf: str, total: int) -> range:
        return self._even(total) if leaf in BY_COLUMNS else range(total)

    def answers(self, leaf: str, total: int) -> bool:
        """Whether this rank is the first of those that hold the same."""
        if leaf in BY_HEADS:
            return self.rank % max(1, self.size // (total // self.head_dim)) == 0
        return self.rank == 0 or leaf in BY_ROWS + BY_COLUMNS + VOCABULARY

    def _even(self, total: int) -> range:
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class Slice:
    """`tensor` is a view of the engine's parameter: the part of tensor `name` that begins at this row and column."""

    name: str
    tensor: Tensor
    first_row: int
    first_column: int


def checkpoint_slices(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], rank: EngineRank
) -> Iterator[Slice]:
    """What this rank answers for of each tensor of the checkpoint; over all ranks each element once, and no padding.

    Raises:
        KeyError: the engine has no such parameter.
    """
    whole_of = {part: (whole, parts) for whole, parts in FUSED.items() for part in parts}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        whole, parts = whole_of.get(leaf, (leaf, (leaf,)))
        siblings = {part: f"{parent}.{part}.{kind}" for part in parts}
        held = parameters[name if whole == leaf else f"{parent}.{whole}.{kind}"]
        if not rank.answers(leaf, shape[0]):
            continue
        before = parts[: parts.index(leaf)]
        if whole in EQUAL_PARTS:
            start = len(before) * (len(held) // len(parts))
        else:
            start = sum(len(rank.rows(part, shapes[siblings[part]][0], len(held))) for part in before)
        rows = rank.rows(leaf, shape[0], len(held))
        columns = rank.columns(leaf, shape[1]) if len(shape) > 1 else range(1)
        places = [slice(start, start + len(rows)), *(slice(len(columns)) for _ in shape[1:])]
        yield Slice(name, held[tuple(places)], rows.start, columns.start)


def rank_checksums(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], rank: EngineRank
) -> dict[str, int]:
    """This rank's part of each tensor's checksum. Errors as for `checkpoint_slices`."""
    slices = checkpoint_slices(parameters, shapes, rank)
    return {each.name: checksum(each.tensor, each.first_row, each.first_column) for each in slices}


def whole_checksums(of_ranks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The parts of all ranks put together."""
    parts: dict[str, list[int]] = {}
    for of_rank in of_ranks:
        for name, part in of_rank.items():
            parts.setdefault(name, []).append(part)
    return {name: add_checksums(found) for name, found in parts.items()}
