"""The nine cells of the weight table: each against the objective that it stands for, computed loss by loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.algo.aggregation import SequenceLayout, sequence_weights

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
DP_SIZE = 3


@st.composite
def batches(draw):
    """(token counts, group ids, layout, a loss for each counted token of each sequence)"""
    rows = draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)), min_size=1)
    )
    counts, groups, ranks, micro_batches = (np.array(column) for column in zip(*rows, strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    losses = [rng.normal(size=n) for n in counts]
    return counts, groups, SequenceLayout(ranks, micro_batches, DP_SIZE), losses


def masked_mean(losses):
    tokens = np.concatenate(losses)
    return tokens.sum() / len(tokens)


def seq_mean(mode, losses):
    return np.mean([loss.sum() if mode == "seq-mean-token-sum" else loss.mean() for loss in losses])


def aggregate(mode, losses):
    return masked_mean(losses) if mode == "token-mean" else seq_mean(mode, losses)


def by_objective(mode, scale, counts, groups, layout, losses):
    """The loss as prose has it, sequences without a counted token left out."""
    alive = [i for i in range(len(counts)) if counts[i] > 0]
    if not alive:
        return 0.0
    if scale == "global":
        return aggregate(mode, [losses[i] for i in alive])
    if scale == "group":
        names = sorted({groups[i] for i in alive})
        return np.mean([aggregate(mode, [losses[i] for i in alive if groups[i] == g]) for g in names])
    total = 0.0
    for rank in range(layout.dp_size):
        on_rank = [i for i in alive if layout.dp_rank[i] == rank]
        for micro_batch in {layout.micro_batch[i] for i in on_rank}:
            inside = [i for i in on_rank if layout.micro_batch[i] == micro_batch]
            share = len(inside) / len(on_rank)
            total += share * aggregate(mode, [losses[i] for i in inside]) / layout.dp_size
    return total


@pytest.mark.parametrize("scale", ["global", "group", "reference"])
@pytest.mark.parametrize("mode", MODES)
@given(batch=batches())
def test_the_weighted_sum_is_the_objective(mode, scale, batch):
    counts, groups, layout, losses = batch
    weights = sequence_weights(mode, scale, counts, groups, layout=layout)
    weighted = sum(w * loss.sum() for w, loss in zip(weights, losses, strict=True))
    # the recipe's 1e-8 in the denominator is a relative 1e-8
    assert weighted == pytest.approx(by_objective(mode, scale, counts, groups, layout, losses), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(
    "mode, scale, expected",
    [
        ("token-mean", "global", [1 / 10] * 3 + [0]),
        ("token-mean", "group", [1 / 8, 1 / 8, 1 / 12, 0]),
        ("token-mean", "reference", [1 / 2 / 4, 1 / 2 / 4, 1 / 2 / 6, 0]),
        ("seq-mean-token-sum", "global", [1 / 3, 1 / 3, 1 / 3, 0]),
        ("seq-mean-token-sum", "group", [1 / 4, 1 / 4, 1 / 2, 0]),
        ("seq-mean-token-sum", "reference", [1 / 4, 1 / 4, 1 / 2, 0]),
        ("seq-mean-token-mean", "global", [1 / 3, 1 / 9, 1 / 18, 0]),
        ("seq-mean-token-mean", "group", [1 / 4, 1 / 12, 1 / 12, 0]),
        ("seq-mean-token-mean", "reference", [1 / 4, 1 / 12, 1 / 12, 0]),
    ],
)
def test_each_cell_by_hand(mode, scale, expected):
    # group 0: sequences of 1 and 3 tokens on rank 0; group 1: 6 tokens and an empty one on rank 1
    layout = SequenceLayout(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0]), dp_size=2)
    weights = sequence_weights(mode, scale, [1, 3, 6, 0], [0, 0, 1, 1], layout=layout)
    np.testing.assert_allclose(weights, expected, rtol=1e-7)


def test_reference_token_mean_depends_on_the_micro_batches_and_global_does_not():
    one = SequenceLayout(np.array([0, 0]), np.array([0, 0]), dp_size=1)
    two = SequenceLayout(np.array([0, 0]), np.array([0, 1]), dp_size=1)
    np.testing.assert_allclose(sequence_weights("token-mean", "reference", [1, 3], [0, 0], layout=one), [1 / 4, 1 / 4])
    np.testing.assert_allclose(sequence_weights("token-mean", "reference", [1, 3], [0, 0], layout=two), [1 / 2, 1 / 6])
    first, second = (sequence_weights("token-mean", "global", [1, 3], [0, 0], layout=layout) for layout in (one, two))
    assert (first == second).all()


def test_micro_batches_of_one_number_on_two_ranks_are_two_micro_batches():
    layout = SequenceLayout(np.array([0, 1]), np.array([0, 0]), dp_size=2)
    weights = sequence_weights("token-mean", "reference", [1, 3], [0, 0], layout=layout)
    np.testing.assert_allclose(weights, [1 / 2, 1 / 6])


def test_a_batch_in_which_nothing_counts_has_weights_of_zero():
    assert sequence_weights("token-mean", "global", [0, 0], [0, 1]).tolist() == [0.0, 0.0]


def test_reference_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="reference depends on the layout"):
        sequence_weights("token-mean", "reference", [1], [0])


def test_a_rank_outside_the_data_parallel_group_is_refused():
    layout = SequenceLayout(np.array([2]), np.array([0]), dp_size=2)
    with pytest.raises(ValueError, match="dp_size 2"):
        sequence_weights("token-mean", "reference", [1], [0], layout=layout)


@pytest.mark.parametrize("counts, groups, named", [([1, 2], [0], r"\(2,\)"), ([-1], [0], "-1")])
def test_counts_that_cannot_be_are_refused(counts, groups, named):
    with pytest.raises(ValueError, match=named):
        sequence_weights("token-mean", "global", counts, groups)
