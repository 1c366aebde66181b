"""Sequences on their way to the ranks: nothing lost or doubled, targets one ahead, no more padding than it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.mcore.attention import PromptFamily, TorchAttentionInputs
from megatron_dapo.mcore.batch import RankBatch, rank_batch
from megatron_dapo.types import MicroBatch, SequenceBatch, TokenTerms
from tests.unit.mcore.helpers import ONE, rank_of


def sequences_of(*lengths: tuple[int, int]) -> SequenceBatch:
    """One sequence for each (prompt, response) length; token ids are 1, 2, 3, ... over the whole batch."""
    prompts, responses = np.array(lengths, np.int64).T
    return SequenceBatch(np.arange(1, (prompts + responses).sum() + 1), prompts + responses, prompts)


def terms_of(batch: SequenceBatch, with_optional: bool = False) -> TokenTerms:
    values_N = np.arange(int(batch.cu_responses[-1]), dtype=np.float32)
    optional = (values_N + 300, values_N + 400, values_N + 500) if with_optional else (None, None, None)
    values_S = np.arange(len(batch), dtype=np.float32)
    return TokenTerms(values_S + 100, values_S + 200, *optional)


def on_cp_ranks(batch: MicroBatch | SequenceBatch, cp_size: int, tp_size: int, packed: bool, sp: bool):
    layouts = [rank_of(cp_rank=rank, cp_size=cp_size, tp_size=tp_size) for rank in range(cp_size)]
    return [rank_batch(batch, layout, packed, sp) for layout in layouts]


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5)


@given(lengths, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_each_response_token_is_predicted_on_one_rank_from_the_token_before_it(
    lengths: list[tuple[int, int]], cp_size: int, tp_size: int, packed: bool, sp: bool
):
    batch = sequences_of(*lengths)
    responses = [batch.token_ids[e - r : e] for e, r in zip(batch.cu_seqlens[1:], batch.response_lengths, strict=True)]
    response_N = np.concatenate(responses)
    position_N = np.concatenate([np.arange(p, p + r) for p, r in lengths])  # of the token in its sequence
    ranks = on_cp_ranks(batch, cp_size, tp_size, packed, sp)
    source = np.concatenate([rank.head.source.numpy() for rank in ranks])
    assert sorted(source) == list(range(len(response_N)))
    for rank in ranks:
        source, at = rank.head.source.numpy(), rank.head.positions
        assert rank.head.num_tokens == len(response_N)
        assert (rank.head.targets.numpy() == response_N[source]).all()
        # Token ids count up, so the token before is the id before; hidden states lie [t, b].
        assert (rank.model.token_ids.T.flatten()[at].numpy() == response_N[source] - 1).all()
        assert (rank.model.position_ids.T.flatten()[at].numpy() == position_N[source] - 1).all()


@given(lengths, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_the_ranks_hold_every_token_and_no_more_padding_than_their_cuts_need(
    lengths: list[tuple[int, int]], cp_size: int, tp_size: int, packed: bool, sp: bool
):
    batch = sequences_of(*lengths)
    ranks = on_cp_ranks(batch, cp_size, tp_size, packed, sp)
    tokens = torch.cat([rank.model.token_ids.flatten() for rank in ranks]).numpy()
    last_N = batch.cu_seqlens[1:] - 1  # what ends a sequence predicts nothing
    assert sorted(tokens[tokens > 0]) == sorted(np.delete(batch.token_ids, last_N))
    shapes = {tuple(rank.model.token_ids.shape) for rank in ranks}
    ((rows, columns),) = shapes  # the same on all ranks
    assert columns % (tp_size if sp else 1) == 0
    assert rows == (1 if packed else len(batch))
    chunk = 2 * cp_size if cp_size > 1 else 1
    whole = math.lcm(chunk, cp_size * (tp_size if sp else 1))
    if packed:
        needed = sum(-(-(sum(length) - 1) // chunk) * chunk for length in lengths)
        local = segments_of(ranks[0])
        assert (np.array(local[: len(lengths)]) * cp_size >= batch.lengths - 1).all()
        assert all(segment * cp_size % chunk == 0 for segment in local)
        assert sum(local) == columns
    else:
        needed = int(batch.lengths.max()) - 1
    assert needed <= columns * cp_size < needed + whole


def segments_of(rank: RankBatch) -> list[int]:
    """Tokens of what attention takes one after another."""
    assert isinstance(rank.model.packed, TorchAttentionInputs)
    return [family.tokens for family, _ in rank.model.packed.families]


def test_packed_sequences_lie_back_to_back():
    found = rank_batch(sequences_of((2, 3), (1, 2)), ONE, packed=True, sp=False)
    assert found.model.token_ids.tolist() == [[1, 2, 3, 4, 6, 7]]
    assert found.model.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert segments_of(found) == [4, 2]
    assert found.head.positions.tolist() == [1, 2, 3, 4, 5]
    assert found.head.targets.tolist() == [3, 4, 5, 7, 8]
    assert found.head.source.tolist() == [0, 1, 2, 3, 4]


def test_padded_sequences_have_a_row_each():
    found = rank_batch(sequences_of((2, 3), (1, 2)), ONE, packed=False, sp=False)
    assert found.model.token_ids.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0]]
    assert found.model.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    # Of the positions [t, b]: row 0 predicts at t = 1, 2, 3, row 1 at t = 0, 1.
    assert found.head.positions.tolist() == [2, 4, 6, 1, 3]
    assert found.head.source.tolist() == [0, 1, 2, 3, 4]
    assert found.head.targets.tolist() == [3, 4, 5, 7, 8]


SHARED = SequenceBatch(  # two responses to 1 2 3, one to 1 2 in between, and one of a single token to 1 2 3
    np.array([1, 2, 3, 10, 11, 12, 1, 2, 20, 21, 1, 2, 3, 30, 31, 1, 2, 3, 40]),
    np.array([6, 4, 5, 4]),
    np.array([3, 2, 3, 3]),
)


def test_sequences_with_one_prompt_share_it():
    found = rank_batch(SHARED, ONE, packed=True, sp=False)
    assert found.model.token_ids.tolist() == [[1, 2, 3, 10, 11, 30, 1, 2, 20]]
    assert found.model.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert isinstance(found.model.packed, TorchAttentionInputs)
    assert [f for f, _ in found.model.packed.families] == [PromptFamily(3, (2, 1, 0)), PromptFamily(3)]
    # The end of the shared prompt predicts the first token of three responses.
    assert found.head.positions.tolist() == [2, 3, 4, 7, 8, 2, 5, 2]
    assert found.head.targets.tolist() == [10, 11, 12, 20, 21, 30, 31, 40]
    assert found.head.source.tolist() == list(range(8))


@pytest.mark.parametrize(("cp_size", "packed", "tokens"), [(2, True, 20), (1, False, 20)])
def test_prompts_are_not_shared_where_sequences_are_cut_or_have_rows_of_their_own(
    cp_size: int, packed: bool, tokens: int
):
    ranks = on_cp_ranks(SHARED, cp_size, 1, packed, sp=False)
    assert sum(rank.model.token_ids.numel() for rank in ranks) == tokens
    found = np.concatenate([rank.model.token_ids.numpy().flatten() for rank in ranks])
    assert (found == 3).sum() == 3


def test_context_parallel_ranks_hold_a_chunk_from_either_end():
    first, second = on_cp_ranks(sequences_of((2, 6), (1, 2)), cp_size=2, tp_size=1, packed=True, sp=False)
    assert segments_of(first) == segments_of(second) == [4, 2]
    assert first.model.token_ids.tolist() == [[1, 2, 7, 0, 9, 0]]
    assert first.model.position_ids.tolist() == [[0, 1, 6, 0, 0, 0]]
    assert second.model.token_ids.tolist() == [[3, 4, 5, 6, 10, 0]]
    assert second.model.position_ids.tolist() == [[2, 3, 4, 5, 1, 0]]
    assert (first.head.source.tolist(), second.head.source.tolist()) == ([0, 5, 6], [1, 2, 3, 4, 7])


@pytest.mark.parametrize(
    ("cp_size", "tp_size", "sp", "packed", "columns"),
    [
        (1, 4, False, True, 12),  # 7 + 5 tokens that predict something, or before one that does
        (1, 8, True, True, 16),
        (2, 1, False, True, 8),  # 8 + 8
        (2, 4, True, True, 8),
        (2, 3, True, True, 12),  # 8 + 8, and 8 more: the whole is a multiple of 4 and of 2 x 3
        (1, 4, False, False, 7),
        (1, 4, True, False, 8),
        (2, 2, True, False, 4),
    ],
)
def test_the_length_on_a_rank(cp_size: int, tp_size: int, sp: bool, packed: bool, columns: int):
    batch = sequences_of((3, 5), (2, 4))
    for rank in on_cp_ranks(batch, cp_size, tp_size, packed, sp):
        assert rank.model.token_ids.size(1) == columns


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("with_optional", [True, False])
def test_each_token_keeps_its_own_terms(packed: bool, with_optional: bool):
    batch = sequences_of((2, 7), (1, 1), (3, 4))
    for rank in on_cp_ranks(MicroBatch(batch, terms_of(batch, with_optional)), 2, 1, packed, sp=False):
        source, terms = rank.head.source, rank.head.terms
        assert terms is not None
        assert torch.equal(terms.weight, terms.sequence + 100.0)
        assert torch.equal(terms.advantage, terms.sequence + 200.0)
        for number, values in enumerate((terms.old_logp, terms.ref_logp, terms.rollout_logp)):
            assert (values is not None) == with_optional
            assert values is None or torch.equal(values, source + (300.0 + 100 * number))
        assert torch.equal(terms.sequence, torch.tensor([0] * 7 + [1] + [2] * 4)[source])
        assert terms.num_sequences == 3


def test_a_token_with_a_log_prob_that_is_not_finite_weighs_nothing_and_no_nan_goes_on():
    given = TokenTerms(
        weight=np.array([8, 9], np.float32),
        advantage=np.array([6, 7], np.float32),
        old_logp=np.array([10, np.nan, 12, 13, 14], np.float32),
        ref_logp=np.array([20, 21, 22, -np.inf, 24], np.float32),
        rollout_logp=np.array([30, 31, 32, 33, np.inf], np.float32),
    )
    terms = rank_batch(MicroBatch(sequences_of((2, 3), (1, 2)), given), ONE, packed=True, sp=False).head.terms
    assert terms is not None
    assert terms.weight.tolist() == [8, 0, 8, 0, 0]
    assert terms.advantage.tolist() == [6, 6, 6, 7, 7]
    logps = [[] if logp is None else logp.tolist() for logp in (terms.old_logp, terms.ref_logp, terms.rollout_logp)]
    assert logps == [[10, 0, 12, 0, 0], [20, 0, 22, 0, 0], [30, 0, 32, 0, 0]]


def test_sequences_alone_have_no_terms():
    assert rank_batch(sequences_of((1, 1)), ONE, packed=True, sp=False).head.terms is None


def test_the_dtypes_are_what_the_model_takes():
    batch = sequences_of((2, 2))
    found = rank_batch(MicroBatch(batch, terms_of(batch, with_optional=True)), ONE, packed=True, sp=False)
    indices = (found.model.token_ids, found.model.position_ids, found.head.positions, found.head.targets)
    assert {tensor.dtype for tensor in indices} == {torch.int64}
    assert found.head.terms is not None
    terms = vars(found.head.terms)
    assert terms.pop("sequence").dtype == torch.int64
    assert terms.pop("num_sequences") == 1
    assert {tensor.dtype for tensor in terms.values()} == {torch.float32}
