"""The plan over many layouts, carried out on arrays of counters; and for 128 ranks."""

from __future__ import annotations

from collections import defaultdict
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.sync.plan import EngineRank, Plan, Topology, make_plan, megatron_ranks
from megatron_dapo.sync.regions import Region, held_regions, wanted_regions
from tests.unit.mcore.helpers import QWEN_32B
from tests.unit.sync.layouts import Layouts, layouts, model_shape


def marked(shape: object, regions: list[Region]) -> dict[str, np.ndarray]:
    """Where the regions are, as counts over whole tensors."""
    counts = {name: np.zeros(dims, int) for name, dims in hf_shapes(shape).items()}
    for region in regions:
        counts[region.name][region.index(counts[region.name].ndim)] += 1
    return counts


def held_by(given_: Layouts, rank: int) -> dict[str, np.ndarray]:
    topology = given_.topology
    where = topology.trainer[rank]
    slot = (where.tp_rank, topology.tp_size, where.pp_rank, topology.pp_size, topology.vpp_size)
    return marked(given_.shape, held_regions(given_.shape, *slot))


@given(layouts())
@settings(max_examples=150)
def test_every_byte_that_an_engine_wants_is_written_exactly_once(given_: Layouts):
    plan = make_plan(given_.shape, given_.topology, 2)
    for reader, engine in enumerate(given_.topology.engines):
        got = marked(given_.shape, [t.region for t in plan.transfers if reader in t.readers])
        wanted = marked(given_.shape, wanted_regions(given_.shape, engine.tp_rank, engine.tp_size))
        for name in wanted:
            assert (wanted[name] <= 1).all(), name
            assert (got[name] == wanted[name]).all(), (name, reader)


@given(layouts())
@settings(max_examples=100)
def test_a_sender_holds_what_it_sends_and_only_nodes_that_want_it_get_it(given_: Layouts):
    plan = make_plan(given_.shape, given_.topology, 2)
    held = {rank: held_by(given_, rank) for rank in {transfer.sender for transfer in plan.transfers}}
    for transfer in plan.transfers:
        whole = held[transfer.sender][transfer.region.name]
        assert whole[transfer.region.index(whole.ndim)].all(), transfer
        assert {given_.topology.engines[reader].node for reader in transfer.readers} == set(transfer.nodes)
        assert transfer.local == (transfer.nodes == (given_.topology.trainer[transfer.sender].node,))


@given(layouts())
@settings(max_examples=100)
def test_bytes_moved_are_the_lower_bound(given_: Layouts):
    """A node needs the union of what its engines want, once; from elsewhere, what no trainer rank on it holds."""
    shape, topology = given_.shape, given_.topology
    plan = make_plan(shape, topology, 4)
    needed = missing = 0
    for node in {engine.node for engine in topology.engines}:
        wants = [wanted_regions(shape, e.tp_rank, e.tp_size) for e in topology.engines if e.node == node]
        union = marked(shape, [region for regions in wants for region in regions])
        there = [held_by(given_, rank) for rank, where in enumerate(topology.trainer) if where.node == node]
        for name, counts in union.items():
            have = sum((held[name] for held in there), np.zeros(counts.shape, int)) > 0
            needed += 4 * int((counts > 0).sum())
            missing += 4 * int(((counts > 0) & ~have).sum())
    assert (plan.written_bytes, plan.network_bytes) == (needed, missing)


@given(layouts())
@settings(max_examples=60)
def test_one_rank_answers_for_each_cell_of_the_model(given_: Layouts):
    plan = make_plan(given_.shape, given_.topology, 2)
    counts = marked(given_.shape, [region for regions in plan.spoken_for for region in regions])
    assert all((count == 1).all() for count in counts.values())


@given(layouts())
@settings(max_examples=60)
def test_the_load_of_ranks_that_hold_the_same_differs_by_a_cell_at_most(given_: Layouts):
    plan = make_plan(given_.shape, given_.topology, 1)
    largest = max(transfer.region.count for transfer in plan.transfers)
    replicas: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for rank, where in enumerate(plan.topology.trainer):
        replicas[where.tp_rank, where.pp_rank, where.node].append(plan.sent_bytes[rank])
    for sent in replicas.values():
        assert max(sent) - min(sent) <= largest


def cluster_plan(*engine_sizes: int) -> Plan:
    """TP8 x PP4 x DP4 on 16 nodes of 8, engines of each size on all of them."""
    nodes = [rank // 8 for rank in range(128)]
    engines = [EngineRank(rank // size, rank % size, size, nodes[rank]) for size in engine_sizes for rank in range(128)]
    return make_plan(QWEN_32B, Topology(megatron_ranks(8, 4, nodes), tuple(engines), 8, 4), 2)


def test_32b_over_128_ranks_into_engines_of_4_and_of_8():
    plan = cluster_plan(4, 8)
    model = 2 * sum(prod(dims) for dims in hf_shapes(QWEN_32B).values())
    assert model == 65_527_752_704
    assert plan.written_bytes == 16 * model  # 48 engines: each node gets the model once
    # A node has one of four stages in its own ranks; stages are not equal (embedding, output layer).
    layer = 2 * sum(prod(d) for name, d in hf_shapes(QWEN_32B).items() if name.startswith("model.layers.0."))
    outside = 2 * 152064 * 5120
    per_stage = [16 * layer + outside, 16 * layer, 16 * layer, 16 * layer + outside + 2 * 5120]
    assert plan.network_bytes == sum(4 * (model - stage) for stage in per_stage)
    assert max(plan.sent_bytes) < 1.15 * min(plan.sent_bytes)


def test_sliced_engines_take_slices_and_not_whole_tensors():
    plan = cluster_plan(8)
    read = sum(2 * transfer.region.count for transfer in plan.transfers if 0 in transfer.readers)
    norms = 2 * 5120 * (2 * 64 + 1)
    assert read == (65_527_752_704 - norms) / 8 + norms


def test_a_layout_in_which_every_rank_has_all_sends_nothing_to_others():
    shape = model_shape(tied=True)
    nodes = [0, 1]
    engines = tuple(EngineRank(rank, 0, 1, node) for rank, node in enumerate(nodes))
    plan = make_plan(shape, Topology(megatron_ranks(1, 1, nodes), engines, 1, 1), 4)
    assert plan.network_bytes == 0
    assert all(transfer.readers == (transfer.sender,) for transfer in plan.transfers)


def test_expert_parallel_ranks_are_replicas_of_dense_weights():
    nodes = list(range(8))
    assert megatron_ranks(2, 2, nodes, ep_size=2) == megatron_ranks(2, 2, nodes)
    with pytest.raises(ValueError, match="8 ranks cannot be divided into tensor 2 x context 1 x pipeline 2 with exp"):
        megatron_ranks(2, 2, nodes, ep_size=3)
    with pytest.raises(ValueError, match="use a multiple of 6"):
        megatron_ranks(3, 2, nodes)


def test_ranks_are_counted_as_megatron_counts_them():
    """Tensor fastest, then context, then data, pipeline slowest."""
    ranks = megatron_ranks(2, 2, list(range(16)), cp_size=2)
    assert [(rank.tp_rank, rank.pp_rank) for rank in ranks] == [(n % 2, n // 8) for n in range(16)]


def test_what_no_rank_holds_is_said():
    topology = Topology(megatron_ranks(2, 1, [0, 0])[:1], (EngineRank(0, 0, 1, 0),), 2, 1)
    with pytest.raises(ValueError, match=r"no trainer rank holds rows \(6, 11\), columns \(0, 6\) of 'model.embed_t"):
        make_plan(model_shape(), topology, 2)
