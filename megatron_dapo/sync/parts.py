"""What each process does in a push: the plan put into buckets and dealt out. Pure code, made once by the driver."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dapo.sync.buckets import Bucket
from megatron_dapo.sync.plan import Plan
from megatron_dapo.sync.regions import Region


@dataclass(frozen=True)
class Processes:
    """Where the ranks of both sides live. A process may be a trainer rank, an engine rank, or one of each."""

    trainer: tuple[int, ...]  # [trainer rank] -> process
    engines: tuple[int, ...]  # [engine rank] -> process


@dataclass(frozen=True)
class Link:
    """Who takes part in a broadcast from one process to others on other nodes."""

    sender: int
    receivers: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    """Slices that travel together, one after the other."""

    link: Link
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Part:
    """One process's. `writers` and `readers` are rows of the node's board; [bucket] is the first axis of the others.

    A process on a node without engines has no board: it only sends.
    """

    process: int
    board: tuple[int, ...]  # the node's processes that write or read its memory
    writers: tuple[int, ...]
    readers: tuple[int, ...]
    writes: tuple[tuple[Region, ...], ...]
    messages: tuple[tuple[Message, ...], ...]  # that this process sends or receives, in an order common to all

    @property
    def row(self) -> int | None:
        return self.board.index(self.process) if self.process in self.board else None

    @property
    def links(self) -> tuple[Link, ...]:
        found = {message.link for messages in self.messages for message in messages}
        return tuple(sorted(found, key=lambda link: (link.sender, link.receivers)))


def make_parts(plan: Plan, buckets: Sequence[Bucket], processes: Processes) -> list[Part]:
    """[process]"""
    count = 1 + max(*processes.trainer, *processes.engines)
    node_of = _nodes(plan, processes)
    bucket_of = {placed.name: index for index, bucket in enumerate(buckets) for placed in bucket.tensors}
    writes: list[list[list[Region]]] = [[[] for _ in buckets] for _ in range(count)]
    travelling: list[dict[Link, list[Region]]] = [defaultdict(list) for _ in buckets]
    readers: dict[int, set[int]] = defaultdict(set)
    writers: dict[int, set[int]] = defaultdict(set)
    for reader, process in enumerate(processes.engines):
        readers[plan.topology.engines[reader].node].add(process)
    for transfer in plan.transfers:
        bucket, sender = bucket_of[transfer.region.name], processes.trainer[transfer.sender]
        if transfer.local:
            writes[sender][bucket].append(transfer.region)
            writers[node_of[sender]].add(sender)
        else:
            chosen = {node: _receiver(node, sender, node_of) for node in transfer.nodes}
            travelling[bucket][Link(sender, tuple(chosen.values()))].append(transfer.region)
            for node, process in chosen.items():
                writers[node].add(process)
    messages = [tuple(Message(link, tuple(regions)) for link, regions in found.items()) for found in travelling]
    parts = []
    for process in range(count):
        node = node_of[process]
        board = tuple(sorted(readers[node] | writers[node])) if readers[node] else ()
        parts.append(
            Part(
                process=process,
                board=board,
                writers=tuple(row for row, one in enumerate(board) if one in writers[node]),
                readers=tuple(row for row, one in enumerate(board) if one in readers[node]),
                writes=tuple(tuple(regions) for regions in writes[process]),
                messages=tuple(tuple(m for m in found if _takes_part(process, m.link)) for found in messages),
            )
        )
    return parts


def _nodes(plan: Plan, processes: Processes) -> dict[int, int]:
    """process -> node"""
    nodes: dict[int, int] = {}
    sides = ((processes.trainer, plan.topology.trainer), (processes.engines, plan.topology.engines))
    for numbers, ranks in sides:
        for process, rank in zip(numbers, ranks, strict=True):
            if nodes.setdefault(process, rank.node) != rank.node:
                raise ValueError(f"process {process} is on node {nodes[process]} and on node {rank.node}; want one")
    return nodes


def _receiver(node: int, sender: int, node_of: dict[int, int]) -> int:
    """The node's process that takes what `sender` sends: they take turns, so that each has its share."""
    there = sorted(process for process, where in node_of.items() if where == node)
    return there[sender % len(there)]


def _takes_part(process: int, link: Link) -> bool:
    return process == link.sender or process in link.receivers
