"""Mini-batches, and the micro-batches of an update."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from megatron_dapo.algo.aggregation import SequenceLayout, sequence_weights
from megatron_dapo.config.tree import RolloutCorrectionConfig
from megatron_dapo.data.minibatch import LossWeighting, MiniBatch, build_update, mini_batches
from megatron_dapo.data.packing import plan_micro_batches
from megatron_dapo.types import Completion, Group, MicroBatch, PlannedMicroBatch, Prompt, Sample, nonfinite_tokens
from tests.unit.data.fakes import graded

GLOBAL = LossWeighting("token-mean", "global", overlong_filtering=False)
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def group(draw_index: int, *lengths: int, truncated: tuple[int, ...] = ()) -> Group:
    """Responses of the given lengths; every token of the batch is another number."""
    prompt = Prompt(draw_index, 1000 * draw_index + np.arange(3), "", "", "")
    samples = [
        Completion(
            draw_index,
            index,
            1000 * draw_index + 100 * (index + 1) + np.arange(length),
            np.zeros(length, np.float32),
            "length" if index in truncated else "stop",
            0,
        )
        for index, length in enumerate(lengths)
    ]
    return Group(draw_index, prompt, tuple(Sample(c, graded(1.0), 0.0, 1.0) for c in samples), 0)


GROUPS = [group(1, 4, 2, 7), group(2, 3, 9), group(3, 5, 1, 6, truncated=(0, 2))]
S, N = 8, 37
RNG = np.random.default_rng(0)
ADVANTAGES, OLD, REF = RNG.normal(size=S), RNG.normal(size=N).astype("f4"), RNG.normal(size=N).astype("f4")


def batch(old_logp: np.ndarray | None = OLD, ref_logp: np.ndarray | None = REF) -> MiniBatch:
    return MiniBatch.from_groups(GROUPS, ADVANTAGES, old_logp, ref_logp)


def plan(dp_size: int, max_tokens: int = 15, multiple_of: int = 1):
    return plan_micro_batches(batch().sequences.lengths, dp_size, max_tokens=max_tokens, multiple_of=multiple_of)


def by_response(values_N: np.ndarray) -> list[np.ndarray]:
    return np.split(values_N, np.cumsum([sample.length for group in GROUPS for sample in group.samples])[:-1])


def by_token(ranks: tuple[tuple[MicroBatch, ...], ...], name: str) -> dict[int, float]:
    """What `terms.<name>` says of each response token that weighs something."""
    given = ("old_logp", "ref_logp", "rollout_logp")
    found = {}
    for micro_batch in (m for rank in ranks for m in rank):
        sequences = micro_batch.sequences
        ids = [
            token
            for s in range(len(sequences))
            for token in sequences.token_ids[
                sequences.cu_seqlens[s] + sequences.prompt_lengths[s] : sequences.cu_seqlens[s + 1]
            ]
        ]
        terms, values = micro_batch.terms, getattr(micro_batch.terms, name)
        values_N = values if name in given else np.repeat(values, sequences.response_lengths)
        weight_N = np.repeat(terms.weight, sequences.response_lengths)
        weight_N[nonfinite_tokens(*(getattr(terms, each) for each in given))] = 0
        for token, weight, value in zip(ids, weight_N, values_N, strict=True):
            if weight:
                assert token not in found
                found[int(token)] = float(value)
    return found


@pytest.mark.parametrize("ratio", ["recompute", "own"])
def test_truncated_importance_sampling_gets_the_engines_log_probs(ratio: str) -> None:
    weighting = replace(GLOBAL, correction=RolloutCorrectionConfig(tis_cap=2.0))
    given = replace(batch(OLD if ratio == "recompute" else None), rollout_logp=by_response(REF + 1))
    update = build_update(given, plan(2), weighting)
    tokens = [int(t) for g in GROUPS for s in g.samples for t in s.completion.token_ids]
    assert by_token(update.ranks, "rollout_logp") == dict(zip(tokens, (REF + 1).tolist(), strict=True))
    olds = [micro_batch.terms.old_logp for rank in update.ranks for micro_batch in rank]
    assert all((old is None) == (ratio == "own") for old in olds)


def test_an_engine_log_prob_that_is_not_finite_counts_only_where_it_is_used() -> None:
    broken = REF.copy()
    broken[3] = -np.inf
    given = replace(batch(), rollout_logp=by_response(broken))
    assert build_update(given, plan(1), GLOBAL).nonfinite_tokens == 0
    weighting = replace(GLOBAL, correction=RolloutCorrectionConfig(tis_cap=2.0))
    update = build_update(given, plan(1), weighting)
    assert (update.nonfinite_tokens, update.tokens) == (1, N - 1)


def test_masked_sequences_are_taken_out_before_denominators() -> None:
    """The first response, 4 tokens, is twice as likely to the trainer as to the engine."""
    rollout = OLD.copy()
    rollout[:4] -= np.log(2)
    weighting = replace(GLOBAL, correction=RolloutCorrectionConfig(mis_low=0.5, mis_high=1.9))
    update = build_update(replace(batch(), rollout_logp=by_response(rollout)), plan(1), weighting)
    assert (update.masked_sequences, update.tokens) == (1, N - 4)
    weights = by_token(update.ranks, "weight")
    assert len(weights) == N - 4
    assert all(weight == pytest.approx(1 / (N - 4)) for weight in weights.values())


def test_mini_batches_are_whole_groups_in_order_and_the_last_may_be_smaller() -> None:
    groups = [group(index, 1) for index in range(7)]
    assert [[g.draw_index for g in part] for part in mini_batches(groups, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_every_token_keeps_its_own_terms_wherever_it_goes(dp_size: int, multiple_of: int) -> None:
    update = build_update(batch(), plan(dp_size, multiple_of=multiple_of), GLOBAL)
    tokens = [int(t) for g in GROUPS for s in g.samples for t in s.completion.token_ids]
    lengths = [s.length for g in GROUPS for s in g.samples]
    assert by_token(update.ranks, "old_logp") == dict(zip(tokens, OLD.tolist(), strict=True))
    assert by_token(update.ranks, "ref_logp") == dict(zip(tokens, REF.tolist(), strict=True))
    wanted = np.repeat(ADVANTAGES.astype("f4"), lengths).tolist()
    assert by_token(update.ranks, "advantage") == dict(zip(tokens, wanted, strict=True))
    assert by_token(update.ranks, "weight") == dict.fromkeys(tokens, float(np.float32(1 / N)))
    assert update.tokens == N


@pytest.mark.parametrize("scale", ["global", "group"])
@pytest.mark.parametrize("mode", MODES)
def test_the_weights_do_not_depend_on_the_layout(mode: str, scale: str) -> None:
    weighting = LossWeighting(mode, scale, overlong_filtering=True)
    one = by_token(build_update(batch(), plan(1, 100), weighting).ranks, "weight")
    many = by_token(build_update(batch(), plan(3, 12, 2), weighting).ranks, "weight")
    assert one == many


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_scale_is_given_the_layout_of_the_plan(mode: str) -> None:
    made = plan(2, 12)
    layout = SequenceLayout(
        np.array([next(r for r in range(2) for held in made[r] if s in held) for s in range(S)]),
        np.array([next(m for r in range(2) for m, held in enumerate(made[r]) if s in held) for s in range(S)]),
        2,
    )
    lengths = batch().sequences.response_lengths
    wanted = sequence_weights(mode, "reference", lengths, batch().group_ids, layout=layout).astype("f4")
    found = by_token(build_update(batch(), made, LossWeighting(mode, "reference", False)).ranks, "weight")
    assert [found[int(s.completion.token_ids[0])] for g in GROUPS for s in g.samples] == wanted.tolist()


def test_a_token_without_a_finite_log_prob_weighs_nothing_and_is_in_no_denominator() -> None:
    old, ref = OLD.copy(), REF.copy()
    old[[0, 5]] = [np.nan, -np.inf]
    ref[[5, 36]] = [np.inf, np.nan]
    update = build_update(batch(old, ref), plan(2), GLOBAL)
    weights = by_token(update.ranks, "weight")
    assert (len(weights), update.tokens, update.nonfinite_tokens) == (N - 3, N - 3, 3)
    assert set(weights.values()) == {float(np.float32(1 / (N - 3)))}
    tokens = [int(t) for g in GROUPS for s in g.samples for t in s.completion.token_ids]
    assert set(tokens) - weights.keys() == {tokens[0], tokens[5], tokens[36]}


def test_a_planned_micro_batch_is_packed_when_it_is_pickled() -> None:
    for planned in (m for rank in build_update(batch(), plan(2), GLOBAL).ranks for m in rank):
        assert isinstance(planned, PlannedMicroBatch)
        sent = pickle.loads(pickle.dumps(planned))
        assert isinstance(sent, MicroBatch)
        for given, arrived in ((planned.sequences, sent.sequences), (planned.terms, sent.terms)):
            assert vars(given).keys() == vars(arrived).keys()
            assert all(np.array_equal(value, vars(arrived)[name]) for name, value in vars(given).items())


def test_epochs_over_the_same_micro_batches_travel_once() -> None:
    (micro_batches,) = build_update(batch(), plan(1), GLOBAL).ranks
    sent = pickle.loads(pickle.dumps([micro_batches, micro_batches]))
    assert sent[0][0] is sent[1][0]


def test_overlong_filtering_gives_truncated_responses_no_weight() -> None:
    update = build_update(batch(), plan(2), LossWeighting("seq-mean-token-sum", "global", overlong_filtering=True))
    weights = by_token(update.ranks, "weight")
    assert (update.truncated_sequences, update.tokens) == (2, N - 11)
    assert not any(3100 <= token < 3200 or 3300 <= token < 3400 for token in weights)
    assert set(weights.values()) == {float(np.float32(1 / 6))}


def test_truncated_responses_count_unless_they_are_filtered() -> None:
    update = build_update(batch(), plan(2), GLOBAL)
    assert (update.truncated_sequences, update.tokens) == (0, N)


def test_an_empty_micro_batch_becomes_two_tokens_of_the_shortest_sequence_without_weight() -> None:
    update = build_update(batch(), (plan(1, 100)[0], ((),)), GLOBAL)
    [[_], [filler]] = update.ranks
    assert filler.sequences.token_ids.tolist() == [3002, 3200]
    assert (filler.sequences.lengths.tolist(), filler.sequences.prompt_lengths.tolist()) == ([2], [1])
    assert filler.terms.weight.tolist() == filler.terms.advantage.tolist() == filler.terms.old_logp.tolist() == [0]
    assert filler.terms.ref_logp.tolist() == [0]


def test_without_a_reference_there_is_no_reference_log_prob() -> None:
    update = build_update(batch(ref_logp=None), (plan(1, 100)[0], ((),)), GLOBAL)
    assert all(m.terms.ref_logp is None for rank in update.ranks for m in rank)


def test_a_plan_of_another_mini_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan places 7 sequences, 7 of them distinct, and the mini-batch has 8"):
        build_update(batch(), (((0, 1, 2), (3, 4, 5, 6)),), GLOBAL)
    with pytest.raises(ValueError, match="the plan places 8 sequences, 7 of them distinct"):
        build_update(batch(), (((0, 1, 2), (3, 4, 5, 6, 6)),), GLOBAL)


@pytest.mark.parametrize("name, wanted", [("advantages", S), ("old_logp", N), ("ref_logp", N)])
def test_an_array_of_another_length_is_refused(name: str, wanted: int) -> None:
    arrays = {"advantages": ADVANTAGES, "old_logp": OLD, "ref_logp": REF}
    with pytest.raises(ValueError, match=rf"{name} has shape \({wanted - 1},\) .* it must be \({wanted},\)"):
        MiniBatch.from_groups(GROUPS, **{**arrays, name: arrays[name][1:]})
