from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dapo.config.tree import MegatronConfig
from megatron_dapo.mcore.footprint import footprint, stage_rank
from megatron_dapo.plan.memory import (
    engine_memory,
    held_by_formula,
    memory_plan,
    micro_batch_size,
    model_elements,
    stage_elements,
)
from tests.unit.mcore.helpers import QWEN_32B
from tests.unit.plan.helpers import cluster_of, run_32b

TIED = replace(QWEN_32B, tied=True)


def plan(**changes: object):
    config = run_32b(**changes)
    megatron = config.actor_rollout_ref.actor.megatron
    return memory_plan(config, QWEN_32B, cluster_of(), lambda stage: held_by_formula(QWEN_32B, megatron, 128, stage), 8)


def test_the_32b_model_has_the_published_number_of_parameters() -> None:
    assert model_elements(QWEN_32B) == 32_763_876_352  # of the checkpoint's safetensors index, in bfloat16


@pytest.mark.parametrize("shape", [QWEN_32B, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(("tp", "pp", "virtual"), [(1, 1, None), (8, 2, None), (4, 4, 2)])
def test_the_formula_is_what_the_model_class_has(shape, tp: int, pp: int, virtual: int | None) -> None:
    config = MegatronConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        params_dtype="bfloat16",
    )
    for stage in {0, pp // 2, pp - 1}:
        found, formula = (
            footprint(shape, config, 128, stage_rank(config, 128, stage)),
            stage_elements(shape, config, stage),
        )
        assert formula == found.elements
        held = held_by_formula(shape, config, 128, stage)
        assert held.weights == pytest.approx(found.parameters, rel=1e-6)
        assert held.gradients == pytest.approx(found.gradients, rel=1e-6)
        assert held.optimizer == pytest.approx(found.master + found.moments, rel=1e-6)


def test_an_engine_has_what_its_share_of_the_card_leaves_beside_the_weights() -> None:
    found = engine_memory(run_32b(), QWEN_32B, cluster_of())
    assert found.weights == 2 * 32_763_876_352 / 4
    assert found.cache == pytest.approx(0.7 * 84.9e9 - found.weights)
    assert found.cache_tokens == int(found.cache / (2 * 64 * 2 * 128 * 2))  # keys and values of 2 heads a GPU


def test_vllm_counts_its_activations_into_its_share() -> None:
    sglang, vllm = (engine_memory(run_32b(rollout__name=name), QWEN_32B, cluster_of()) for name in ("sglang", "vllm"))
    assert sglang.cache - vllm.cache == pytest.approx(4e9)


def test_what_is_offloaded_is_not_there_while_engines_write_and_is_in_host_memory() -> None:
    away, stays = plan(), plan(actor__offload=[])
    first = away.stages[0].held
    assert "optimizer" not in away.stages[0].phases["rollout"]
    assert stays.stages[0].total("rollout") - away.stages[0].total("rollout") == pytest.approx(
        first.weights + first.gradients + first.optimizer
    )
    assert away.stages[0].phases["update"] == stays.stages[0].phases["update"]
    assert away.host_bytes == pytest.approx(max(s.held.weights + s.held.optimizer for s in away.stages))
    assert stays.host_bytes == 0


def test_at_the_weight_sync_the_policys_weights_and_the_engine_are_both_there() -> None:
    parts = plan().stages[0].phases["weight sync"]
    assert set(parts) == {"weights", "engine weights", "engine cache", "engine overhead"}


def test_an_engine_that_does_not_sleep_stays_in_the_update() -> None:
    asleep, awake = plan(), plan(rollout__free_cache_engine=False)
    assert awake.stages[0].phases["update"]["engine asleep"] == pytest.approx(awake.engine.awake)
    assert asleep.stages[0].phases["update"]["engine asleep"] == 1.5e9
    assert asleep.fits
    assert not plan(rollout__gpu_memory_utilization=0.95).fits


def test_separate_engines_share_nothing_with_the_policy() -> None:
    found = plan(runtime__colocate=False, rollout__nnodes=4, rollout__n_gpus_per_node=8)
    assert all("engine" not in part for stage in found.stages for phase in stage.phases.values() for part in phase)
    assert found.peak == found.engine.awake


def test_a_reference_is_in_host_memory_and_swapped_in_a_parameter_at_a_time() -> None:
    found = plan(actor__use_kl_loss=True, actor__kl_loss_coef=0.1)
    assert found.stages[0].phases["log-probs"]["reference swap"] == found.stages[0].held.largest
    assert found.host_bytes > plan().host_bytes


def test_the_fullest_micro_batch_is_the_limit_or_so_many_longest_sequences() -> None:
    assert micro_batch_size(run_32b()).tokens == 22528
    fixed = run_32b(actor__use_dynamic_bsz=False, actor__ppo_micro_batch_size_per_gpu=3)
    assert micro_batch_size(fixed).tokens == 3 * 22528
