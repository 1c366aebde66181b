"""The reshard plan: which slice of which tensor goes from which trainer rank to which engine rank. Pure code.

Every tensor is cut along the borders of all that trainer ranks hold and engine ranks want. Such a cell is inside or
outside of each, never across. A cell enters a node once, from one sender, and all engine ranks of the node read it
there: a holder on the node where there is one; else one holder elsewhere sends it to all nodes that lack it at once.
Among the holders that could send (data- and context-parallel replicas, norms that tensor parallelism repeats, a tied
embedding on two stages) the one with the fewest bytes so far is taken, largest cells first.

Left out: how bytes travel (`staged.py`), and where they lie in memory on the way (`buckets.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from megatron_dapo.mcore.families.dense import ModelShape
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.sync.regions import Region, Span, held_regions, wanted_regions


@dataclass(frozen=True)
class TrainerRank:
    """Ranks that agree in `tp_rank` and `pp_rank` hold the same slices."""

    tp_rank: int
    pp_rank: int
    node: int


@dataclass(frozen=True)
class EngineRank:
    engine: int
    tp_rank: int
    tp_size: int
    node: int


@dataclass(frozen=True)
class Topology:
    """The two layouts, and on which node each rank sits. Positions in the tuples are the ranks' numbers."""

    trainer: tuple[TrainerRank, ...]
    engines: tuple[EngineRank, ...]
    tp_size: int
    pp_size: int
    vpp_size: int | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """`sender` (a trainer rank) brings `region` to each of `nodes`, where `readers` (engine ranks) take it."""

    region: Region
    sender: int
    nodes: tuple[int, ...]
    readers: tuple[int, ...]
    local: bool  # to the sender's own node, and no other


@dataclass(frozen=True)
class Plan:
    topology: Topology
    itemsize: int  # bytes of an element
    transfers: tuple[Transfer, ...]  # in the checkpoint's order of tensors

    @cached_property
    def written_bytes(self) -> int:
        """Bytes written into nodes, over all nodes: each node's engines' slices, once."""
        return self.itemsize * sum(t.region.count * len(t.nodes) for t in self.transfers)

    @cached_property
    def network_bytes(self) -> int:
        """The part of it that comes from other nodes."""
        return self.itemsize * sum(t.region.count * len(t.nodes) for t in self.transfers if not t.local)

    @cached_property
    def sent_bytes(self) -> tuple[int, ...]:
        """[trainer rank] what it sends, a cell that goes to several nodes at once counted once."""
        sent = [0] * len(self.topology.trainer)
        for transfer in self.transfers:
            sent[transfer.sender] += self.itemsize * transfer.region.count
        return tuple(sent)

    @cached_property
    def spoken_for(self) -> tuple[tuple[Region, ...], ...]:
        """[trainer rank] the cells that this rank answers for: each cell of the model is in one rank's list."""
        found: list[list[Region]] = [[] for _ in self.topology.trainer]
        seen: set[Region] = set()
        for transfer in self.transfers:
            if transfer.region not in seen:
                seen.add(transfer.region)
                found[transfer.sender].append(transfer.region)
        return tuple(map(tuple, found))


def megatron_ranks(
    tp_size: int, pp_size: int, nodes: Sequence[int], cp_size: int = 1, ep_size: int = 1
) -> tuple[TrainerRank, ...]:
    """The ranks of a job in Megatron's order (tensor, context, data, pipeline); `nodes[rank]` is where each sits.

    Expert parallelism divides data- and context-parallel ranks for expert weights alone: whatever `ep_size`, ranks
    that differ in it hold the same dense weights.

    Raises:
        ValueError: the ranks cannot be divided so.
    """
    model = tp_size * cp_size * pp_size
    replicas, rest = divmod(len(nodes), model)
    if rest or not replicas or (replicas * cp_size) % ep_size:
        raise ValueError(
            f"{len(nodes)} ranks cannot be divided into tensor {tp_size} x context {cp_size} x pipeline {pp_size} "
            f"with experts over {ep_size}; use a multiple of {model} whose data x context part {ep_size} divides"
        )
    stage = len(nodes) // pp_size
    return tuple(TrainerRank(rank % tp_size, rank // stage, node) for rank, node in enumerate(nodes))


def make_plan(shape: ModelShape, topology: Topology, itemsize: int) -> Plan:
    """The plan for one model and two layouts; the same at every push.

    Raises:
        ValueError: an engine's layout that the model cannot be split by, or ranks that do not hold all of it.
    """
    cells = list(_cells(shape, topology))
    cells.sort(key=lambda cell: -cell.region.count)  # stable; large ones first, so that small ones even out
    sent = [0] * len(topology.trainer)
    found: dict[Region, list[Transfer]] = {}
    for cell in cells:
        found[cell.region] = list(_transfers(cell, topology, sent))
    order = {name: number for number, name in enumerate(hf_shapes(shape))}
    regions = sorted(found, key=lambda region: (order[region.name], region.rows, region.cols))
    return Plan(topology, itemsize, tuple(transfer for region in regions for transfer in found[region]))


@dataclass(frozen=True, slots=True)
class _Cell:
    region: Region
    holders: list[int]  # trainer ranks
    readers: dict[int, list[int]]  # node -> its engine ranks


def _transfers(cell: _Cell, topology: Topology, sent: list[int]) -> Iterator[Transfer]:
    """Updates `sent`, the elements that each trainer rank sends."""

    def chosen(candidates: list[int]) -> int:
        sender = min(candidates, key=lambda rank: (sent[rank], rank))
        sent[sender] += cell.region.count
        return sender

    by_node: dict[int, list[int]] = defaultdict(list)
    for rank in cell.holders:
        by_node[topology.trainer[rank].node].append(rank)
    far = []
    for node, readers in cell.readers.items():
        if node in by_node:
            yield Transfer(cell.region, chosen(by_node[node]), (node,), tuple(readers), True)
        else:
            far.append(node)
    if far:
        readers = tuple(reader for node in far for reader in cell.readers[node])
        yield Transfer(cell.region, chosen(cell.holders), tuple(far), readers, False)


def _cells(shape: ModelShape, topology: Topology) -> Iterator[_Cell]:
    """All cells that some engine rank wants."""
    holders = _by_tensor(
        {
            slot: held_regions(shape, slot[0], topology.tp_size, slot[1], topology.pp_size, topology.vpp_size)
            for slot in {(rank.tp_rank, rank.pp_rank) for rank in topology.trainer}
        }
    )
    wanters = _by_tensor(
        {kind: wanted_regions(shape, *kind) for kind in {(rank.tp_rank, rank.tp_size) for rank in topology.engines}}
    )
    ranks_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, where in enumerate(topology.trainer):
        ranks_of[where.tp_rank, where.pp_rank].append(rank)
    readers_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for reader, engine in enumerate(topology.engines):
        readers_of[engine.tp_rank, engine.tp_size].append(reader)
    for name, wanted in wanters.items():
        held = holders.get(name, [])
        for region in _grid(name, [area for area, _ in held + wanted]):
            kinds = [kind for area, kind in wanted if area.contains(region)]
            ranks = [rank for area, slot in held if area.contains(region) for rank in ranks_of[slot]]
            if kinds and not ranks:
                raise ValueError(f"no trainer rank holds rows {region.rows}, columns {region.cols} of {name!r}")
            readers: dict[int, list[int]] = defaultdict(list)
            for reader in sorted(reader for kind in kinds for reader in readers_of[kind]):
                readers[topology.engines[reader].node].append(reader)
            if readers:
                yield _Cell(region, sorted(ranks), dict(readers))


_Slot = tuple[int, int]


def _by_tensor(regions: dict[_Slot, list[Region]]) -> dict[str, list[tuple[Region, _Slot]]]:
    found: dict[str, list[tuple[Region, _Slot]]] = defaultdict(list)
    for slot, held in regions.items():
        for region in held:
            found[region.name].append((region, slot))
    return found


def _grid(name: str, areas: Sequence[Region]) -> Iterator[Region]:
    """The cells that all borders of `areas` cut out."""
    for rows in _spans(area.rows for area in areas):
        for cols in _spans(area.cols for area in areas):
            yield Region(name, rows, cols)


def _spans(spans: Iterable[Span]) -> list[Span]:
    cuts = sorted({end for span in spans for end in span})
    return list(pairwise(cuts))
