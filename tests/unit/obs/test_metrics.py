from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_dapo.data.sampling_stats import SamplingStats
from megatron_dapo.mcore.fused_loss import SUMS
from megatron_dapo.obs.memory import memory_metrics
from megatron_dapo.obs.metric_table import find_metric
from megatron_dapo.obs.metrics import group_metrics, mismatch, sampling_metrics, throughput_metrics, update_metrics
from megatron_dapo.obs.timers import Timers
from megatron_dapo.types import Completion, Group, Prompt, RewardResult, Sample


def sample(tokens, right, penalty=0.0, finish="stop", status="ok") -> Sample:
    ids = np.array(tokens)
    completion = Completion(0, 0, ids, np.zeros(len(ids), np.float32), finish, 0)
    score = 1.0 if right else -1.0
    result = RewardResult(status, score, {"score": score, "acc": float(right)})
    return Sample(completion, result, penalty, score + penalty)


def group(*samples: Sample) -> Group:
    return Group(0, Prompt(0, np.array([1, 2]), "1+1", "sums", "2"), samples, 0)


GROUPS = [
    group(sample([7, 8, 9], True), sample([5] * 8, False, penalty=-0.5, finish="length", status="unparsable")),
    group(sample([1, 2], True), sample([3], False), sample([1, 2, 3, 4], False)),
]


def test_group_metrics_are_means_over_samples_not_over_groups():
    assert group_metrics(GROUPS) == pytest.approx(
        {
            "reward/mean": (1 - 1.5 + 1 - 1 - 1) / 5,
            "reward/score": -1 / 5,
            "reward/accuracy": 2 / 5,
            "reward/overlong_penalty": -0.1,
            "reward/unparsable_share": 1 / 5,
            "response/length_mean": 18 / 5,
            "response/length_max": 8,
            "response/length_min": 1,
            "response/truncated_share": 1 / 5,
            "response/repetition": 0.8 / 5,  # five 4-grams of one token, four of them repeats
        }
    )


def test_a_step_without_samples_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        group_metrics([])


def test_without_acc_there_is_no_accuracy():
    scored = sample([1], True)
    bare = Sample(scored.completion, RewardResult("ok", 0.3, {"score": 0.3}), 0.0, 0.3)
    found = group_metrics([group(bare, bare)])
    assert "reward/accuracy" not in found
    assert found["reward/score"] == pytest.approx(0.3)


def test_sampling_means_are_over_all_that_was_scored():
    counters = {"groups_generated": 8, "groups_accepted": 2, "samples_scored": 32, "acc_sum": 24.0, "score_sum": -8.0}
    assert sampling_metrics(counters) == {
        "sampling/groups_generated": 8,
        "sampling/groups_accepted": 2,
        "sampling/samples_scored": 32,
        "sampling/kept_share": 0.25,
        "sampling/accuracy": 0.75,
        "sampling/score": -0.25,
    }


def test_a_step_of_carried_groups_alone_has_counters_and_no_shares():
    found = sampling_metrics(asdict(SamplingStats(groups_used=4, groups_carried_in=4)))
    assert found["sampling/groups_used"] == 4
    assert not {"sampling/kept_share", "sampling/accuracy", "sampling/score"} & set(found)


def test_updates_average_losses_over_updates_and_the_rest_over_tokens():
    sums = [{"tokens": 30.0, "loss": 0.5, "entropy": 15.0}, {"tokens": 10.0, "loss": 0.25, "entropy": 1.0}]
    assert update_metrics(sums, [1.0, 3.0], lr=0.1, skipped=1) == {
        "actor/lr": 0.1,
        "actor/updates": 2,
        "actor/skipped_updates": 1,
        "actor/grad_norm": 2.0,
        "actor/loss": 0.375,
        "actor/entropy": 0.4,
    }


def test_a_step_whose_updates_were_all_skipped_says_so():
    assert update_metrics([], [], lr=0.1, skipped=2) == {
        "actor/lr": 0.1,
        "actor/updates": 0,
        "actor/skipped_updates": 2,
    }


def test_mismatch_of_numbers_worked_by_hand():
    engine = np.log(np.array([0.5, 0.5, 0.25], np.float32))
    trainer = np.log(np.array([0.25, 0.5, 0.5], np.float32))  # weights 1/2, 1, 2; by sequence 1/2, 2
    found = mismatch(trainer, engine, np.array([0, 2, 3]))
    assert found.metrics() == pytest.approx(
        {
            "mismatch/logp_diff_mean": 2 * np.log(2) / 3,
            "mismatch/logp_diff_max": np.log(2),
            "mismatch/kl_k1": 0,
            "mismatch/kl_k3": ((0.5 - 1 + np.log(2)) + 0 + (2 - 1 - np.log(2))) / 3,
            "mismatch/ess_tokens": 3.5**2 / (3 * 5.25),
            "mismatch/ess_sequences": 2.5**2 / (2 * 4.25),
        },
        abs=1e-7,
    )


def test_both_kl_estimates_find_the_kl_of_engine_to_trainer():
    rng = np.random.default_rng(0)
    engine, trainer = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = rng.choice(3, 400_000, p=engine)
    found = mismatch(np.log(trainer)[drawn], np.log(engine)[drawn], np.arange(400_001))
    exact = float(np.sum(engine * np.log(engine / trainer)))
    assert found.kl_k1 == pytest.approx(exact, rel=0.05)
    assert found.kl_k3 == pytest.approx(exact, rel=0.02)
    assert found.ess_tokens == pytest.approx(1 / np.sum(trainer**2 / engine), rel=0.01)


def test_long_sequences_far_apart_keep_the_effective_sample_size_finite():
    d = np.repeat(np.array([1.0, -1.0], np.float32), 20_000)
    found = mismatch(d, np.zeros_like(d), np.array([0, 20_000, 40_000]))
    assert found.ess_sequences == pytest.approx(0.5)


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-20, 0, width=32)))
def test_equal_log_probs_have_no_mismatch(logp):
    found = mismatch(logp, logp, np.array([0, len(logp)]))
    assert (found.logp_diff_max, found.kl_k1, found.kl_k3, found.ess_tokens, found.ess_sequences) == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("lengths, cu", [((3, 2), [0, 3]), ((3, 3), [0, 2]), ((3, 3), [0, 0, 3]), ((0, 0), [0])])
def test_log_probs_that_do_not_fit_together_are_refused(lengths, cu):
    with pytest.raises(ValueError, match=f"found {lengths[0]} of the trainer, {lengths[1]} of the engine"):
        mismatch(np.zeros(lengths[0]), np.zeros(lengths[1]), np.array(cu))


def test_every_metric_that_this_package_makes_is_in_the_table():
    timers = Timers()
    with timers.phase("rollout"), timers.phase("reward"):
        pass
    logp = np.zeros(1, np.float32)
    sums = dict.fromkeys(SUMS, 1.0)
    made = (
        group_metrics(GROUPS)
        | sampling_metrics(asdict(SamplingStats(groups_generated=1, samples_scored=1)))
        | update_metrics([sums], [1.0], 0.1, 0)
        | mismatch(logp, logp, np.array([0, 1])).metrics()
        | throughput_metrics(100, 2.0, 50, 1.0)
        | memory_metrics()
        | timers.flush()
    )
    assert [name for name in made if find_metric(name) is None] == []


def test_the_table_tells_patterns_apart_and_knows_no_other_name():
    assert find_metric("val/openai/gsm8k/avg@32").meaning.startswith("right responses")
    assert find_metric("val/openai/gsm8k/avg@32_low").meaning.startswith("lower end")
    assert find_metric("seconds/step").meaning == "wall time of the step"
    assert find_metric("seconds/rollout/reward").unit == "s"
    assert [find_metric(name) for name in ("reward/meen", "seconds/", "val/x/avg@many", "xreward/mean")] == [None] * 4


def test_throughput_is_tokens_over_their_seconds():
    assert list(throughput_metrics(100, 4.0, 60, 2.0).values()) == [25, 30]


def test_memory_is_in_gib_and_its_peak_is_not_below_it():
    held = np.ones(2**25)  # 1/4 GiB
    found = memory_metrics()
    assert held[0] / 4 < found["memory/resident"] < 64
    assert found["memory/resident"] <= found["memory/resident_peak"] * 1.01
