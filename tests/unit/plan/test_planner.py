from __future__ import annotations

import pytest

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.plan.planner import Planner
from megatron_dapo.plan.timeline import POLICY
from tests.unit.mcore.helpers import QWEN_32B
from tests.unit.plan.helpers import cluster_of, run_32b


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(QWEN_32B, cluster_of())


def test_the_32b_recipe_fits_on_128_gpus_and_takes_minutes_a_step(planner: Planner) -> None:
    plan = planner.plan(run_32b(), policies=(POLICY,))
    assert plan.memory.fits
    assert 300 < plan.timeline.step_seconds < 1800
    assert plan.timeline.gpu_hours == pytest.approx(plan.timeline.step_seconds * 320 * 128 / 3600)
    assert not [warning for warning in plan.warnings if "does not fit" in warning]


def test_the_formula_and_the_model_class_give_one_plan(planner: Planner) -> None:
    exact, rough = (planner.plan(run_32b(), policies=(POLICY,), exact=exact) for exact in (True, False))
    assert rough.memory.peak == pytest.approx(exact.memory.peak, rel=1e-6)
    assert rough.timeline.step_seconds == pytest.approx(exact.timeline.step_seconds, rel=1e-6)


def test_what_does_not_fit_is_planned_and_said_with_a_remedy(planner: Planner) -> None:
    plan = planner.plan(
        run_32b(actor__megatron__tensor_model_parallel_size=4,
            actor__megatron__recompute_granularity=None, actor__megatron__recompute_method=None,
                actor__megatron__recompute_num_layers=None),
        policies=(POLICY,),
    )  # fmt: skip
    assert not plan.memory.fits
    assert any("does not fit: update takes" in warning and "recompute" in warning for warning in plan.warnings)


def test_a_pipeline_with_few_micro_batches_is_warned_of(planner: Planner) -> None:
    plan = planner.plan(
        run_32b(actor__megatron__pipeline_model_parallel_size=16, actor__ppo_mini_batch_size=8), policies=(POLICY,)
    )
    assert any("pipeline bubble" in warning for warning in plan.warnings)


def test_a_cache_too_small_for_the_concurrency_is_warned_of(planner: Planner) -> None:
    few = planner.plan(run_32b(rollout__max_num_seqs=64), policies=(POLICY,)).warnings
    many = planner.plan(run_32b(rollout__max_num_seqs=1024), policies=(POLICY,)).warnings
    assert not any("an engine's cache holds" in warning for warning in few)
    assert any("rollout.max_num_seqs is 1024" in warning for warning in many)


def test_generation_batches_that_dynamic_sampling_needs_are_said() -> None:
    planner = Planner(QWEN_32B, cluster_of(assume=("pass_rate=0.05", "pass_rate_concentration=0.2")))
    small = run_32b(data__gen_batch_size=512, algorithm__filter_groups__max_num_gen_batches=100)
    plan = planner.plan(small, policies=(POLICY,))
    assert any("generation batches a step" in warning for warning in plan.warnings)
    limited = run_32b(data__gen_batch_size=512, algorithm__filter_groups__max_num_gen_batches=2)
    assert any("are needed, and max_num_gen_batches 2" in w for w in planner.plan(limited, policies=(POLICY,)).warnings)


def test_a_layout_that_the_cluster_or_the_model_cannot_split_is_refused(planner: Planner) -> None:
    with pytest.raises(ConfigError, match="not divisible"):
        planner.plan(run_32b(actor__megatron__pipeline_model_parallel_size=3))
    with pytest.raises(ConfigError, match="num_attention_heads 40 cannot be split"):
        planner.plan(run_32b(actor__megatron__tensor_model_parallel_size=16))


def test_an_engine_without_room_for_the_longest_sequence_is_refused(planner: Planner) -> None:
    with pytest.raises(ConfigError, match=r"has room for .* tokens beside its weights, and a sequence may have 20680"):
        planner.plan(run_32b(rollout__gpu_memory_utilization=0.2))
