"""The parts of all processes together, carried out on plain arrays, put the model into every node."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.sync.buckets import make_buckets
from megatron_dapo.sync.parts import Link, Part, Processes, make_parts
from megatron_dapo.sync.plan import EngineRank, Topology, make_plan, megatron_ranks
from megatron_dapo.sync.regions import wanted_regions
from tests.unit.sync.layouts import Layouts, layouts, model_shape


def apart(given_: Layouts) -> Processes:
    count = len(given_.topology.trainer)
    return Processes(tuple(range(count)), tuple(range(count, count + len(given_.topology.engines))))


def node_of(given_: Layouts, process: int) -> int:
    ranks = (*given_.topology.trainer, *given_.topology.engines)
    return ranks[process].node


def written(given_: Layouts, parts: list[Part]) -> dict[int, dict[str, np.ndarray]]:
    """node -> how often each element is written there, over all buckets."""
    counts = {
        engine.node: {name: np.zeros(dims, int) for name, dims in hf_shapes(given_.shape).items()}
        for engine in given_.topology.engines
    }
    for part in parts:
        node = node_of(given_, part.process)
        arriving = [m for messages in part.messages for m in messages if part.process in m.link.receivers]
        regions = [region for of_bucket in part.writes for region in of_bucket]
        for region in regions + [region for message in arriving for region in message.regions]:
            whole = counts[node][region.name]
            whole[region.index(whole.ndim)] += 1
    return counts


@given(layouts(), st.sampled_from([1, 100, 400, 10**6]))
@settings(max_examples=100)
def test_every_byte_that_a_node_wants_is_written_there_once(given_: Layouts, bucket_bytes: int):
    plan = make_plan(given_.shape, given_.topology, 2)
    buckets = make_buckets(hf_shapes(given_.shape), 2, bucket_bytes)
    parts = make_parts(plan, buckets, apart(given_))
    for node, counts in written(given_, parts).items():
        for engine in (engine for engine in given_.topology.engines if engine.node == node):
            for region in wanted_regions(given_.shape, engine.tp_rank, engine.tp_size):
                whole = counts[region.name]
                assert (whole[region.index(whole.ndim)] == 1).all(), (node, region)
    moved = sum(int(count.sum()) for counts in written(given_, parts).values() for count in counts.values())
    assert 2 * moved == plan.written_bytes


@given(layouts(), st.sampled_from([1, 400, 10**6]))
@settings(max_examples=60)
def test_members_of_a_link_have_its_messages_in_the_same_order(given_: Layouts, bucket_bytes: int):
    buckets = make_buckets(hf_shapes(given_.shape), 2, bucket_bytes)
    parts = make_parts(make_plan(given_.shape, given_.topology, 2), buckets, apart(given_))
    for index, bucket in enumerate(buckets):
        names = {placed.name for placed in bucket.tensors}
        for link in {message.link for part in parts for message in part.messages[index]}:
            members = [parts[process] for process in (link.sender, *link.receivers)]
            seen = [[m for m in part.messages[index] if m.link == link] for part in members]
            assert all(messages == seen[0] for messages in seen)
        regions = [r for part in parts for r in part.writes[index]]
        assert {region.name for region in regions} <= names


@given(layouts())
@settings(max_examples=60)
def test_a_board_has_the_writers_and_readers_of_its_node(given_: Layouts):
    buckets = make_buckets(hf_shapes(given_.shape), 2, 10**6)
    processes = apart(given_)
    for part in make_parts(make_plan(given_.shape, given_.topology, 2), buckets, processes):
        node = node_of(given_, part.process)
        engines = {p for p in processes.engines if node_of(given_, p) == node}
        assert {part.board[row] for row in part.readers} == engines
        writes = any(part.writes) or any(part.process in m.link.receivers for ms in part.messages for m in ms)
        assert writes == (part.row in part.writers)
        assert bool(part.board) == bool(engines)


def test_what_comes_from_elsewhere_is_spread_over_the_processes_of_a_node():
    nodes = [0, 0, 1, 1]
    engines = tuple(EngineRank(0, rank, 2, 2) for rank in range(2))
    plan = make_plan(model_shape(), Topology(megatron_ranks(2, 1, nodes), engines, 2, 1), 2)
    parts = make_parts(plan, make_buckets(hf_shapes(model_shape()), 2, 10**6), Processes((0, 1, 2, 3), (4, 5)))
    links = {link for part in parts for link in part.links}
    assert links == {Link(0, (4,)), Link(1, (5,)), Link(2, (4,)), Link(3, (5,))}


def test_a_process_cannot_be_on_two_nodes():
    topology = Topology(megatron_ranks(1, 1, [0]), (EngineRank(0, 0, 1, 3),), 1, 1)
    plan = make_plan(model_shape(), topology, 2)
    with pytest.raises(ValueError, match="process 0 is on node 0 and on node 3"):
        make_parts(plan, make_buckets(hf_shapes(model_shape()), 2, 10**6), Processes((0,), (0,)))
