from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dapo.config.tree import ConfigError
from megatron_dapo.plan.memory import engine_memory
from megatron_dapo.plan.timeline import engine_model, placement, weight_sync_seconds, workload_of
from tests.unit.mcore.helpers import QWEN_32B
from tests.unit.plan.helpers import cluster_of, run_32b


def test_colocated_engines_take_the_policys_gpus() -> None:
    found = placement(run_32b(), cluster_of())
    assert (found.policy, found.rollout, found.engines) == (128, 128, 32)


def test_separate_engines_take_nodes_of_their_own() -> None:
    found = placement(run_32b(runtime__colocate=False, rollout__nnodes=4, rollout__n_gpus_per_node=8), cluster_of())
    assert (found.policy, found.rollout, found.engines) == (96, 32, 8)
    with pytest.raises(ConfigError, match="leave 0 for the policy"):
        placement(run_32b(runtime__colocate=False, rollout__nnodes=16, rollout__n_gpus_per_node=8), cluster_of())


def test_a_reference_of_its_own_takes_nodes_of_its_own_too() -> None:
    kl = {"actor__use_kl_loss": True, "actor__kl_loss_coef": 0.1, "ref__nnodes": 4, "ref__n_gpus_per_node": 8}
    found = placement(run_32b(**kl), cluster_of())
    assert (found.policy, found.rollout, found.engines, found.reference) == (96, 96, 24, 32)
    engines = {"runtime__colocate": False, "rollout__nnodes": 12, "rollout__n_gpus_per_node": 8}
    with pytest.raises(ConfigError, match=r"leave 0 for the policy beside ref.nnodes 4 and rollout.nnodes 12"):
        placement(run_32b(**kl, **engines), cluster_of())


def test_a_decode_step_reads_the_weights_and_the_cache_once() -> None:
    config, cluster = run_32b(), cluster_of(assume=("hbm_efficiency=1", "decode_efficiency=1", "decode_layer_s=0"))
    found = engine_model(config, QWEN_32B, cluster, engine_memory(config, QWEN_32B, cluster))
    assert found.weights_s == pytest.approx(2 * 32_763_876_352 / 4 / 3.35e12)
    assert found.token_s == pytest.approx(64 * 2 * 2 * 128 * 2 / 3.35e12)
    assert found.sequence_s == pytest.approx(2 * 32_763_876_352 / 4 / 989.4e12)
    assert found.step_s == 3e-3


def test_without_cuda_graphs_a_step_is_slower() -> None:
    cluster = cluster_of()
    plain, eager = (
        engine_model(config, QWEN_32B, cluster, engine_memory(config, QWEN_32B, cluster))
        for config in (run_32b(), run_32b(rollout__enforce_eager=True))
    )
    assert eager.step_s - plain.step_s == pytest.approx(64 * (3e-4 - 2e-5))


def test_the_workload_has_no_filter_where_the_run_has_none() -> None:
    assert workload_of(run_32b(algorithm__filter_groups__enable=False), cluster_of()).kept_share == 1
    found = workload_of(run_32b(), cluster_of())
    assert (found.mean, found.limit, found.prompt) == (4096, 20480, 200)
    assert 0.6 < found.kept_share < 0.8


def test_weights_go_through_each_nodes_memory_as_the_page_on_weight_sync_says() -> None:
    """16.4 GB and 49.1 GB in, out to two engines; 65.5 GB over 8 adapters (there at 50 GB/s, the whole model here)."""
    cluster = cluster_of(assume=("network_efficiency=1",))
    found = weight_sync_seconds(run_32b(), QWEN_32B, cluster, placement(run_32b(), cluster))
    assert found == pytest.approx(65.53 * 3 / 200 + 65.53 / 400, rel=1e-3)
    one = replace(cluster, nodes=1)
    assert weight_sync_seconds(run_32b(), QWEN_32B, one, placement(run_32b(), one)) == pytest.approx(0.983, rel=1e-2)
