from __future__ import annotations

from itertools import pairwise

from megatron_dapo.plan.planner import Planner
from megatron_dapo.plan.search import candidates, search
from megatron_dapo.plan.timeline import POLICY
from tests.unit.mcore.helpers import QWEN_32B
from tests.unit.plan.helpers import cluster_of, run_32b

SMALL = {"data__train_batch_size": 64, "data__gen_batch_size": 64, "actor__ppo_mini_batch_size": 32}


def test_the_best_layouts_fit_are_in_order_and_faster_than_the_recipes() -> None:
    planner = Planner(QWEN_32B, cluster_of(nodes=4))
    config = run_32b(**SMALL)
    found = search(planner, config, most=3)
    seconds = [plan.timeline.step_seconds for plan in found.best]
    assert len(found.best) == 3
    assert seconds == sorted(seconds)
    assert all(plan.memory.fits for plan in found.best)
    assert seconds[0] <= planner.plan(config, policies=(POLICY,)).timeline.step_seconds
    assert found.tried > found.fitting > 3


def test_every_split_divides_heads_layers_and_gpus_and_holds_the_longest_sequence() -> None:
    cluster = cluster_of(nodes=4)
    found = list(candidates(run_32b(**SMALL), QWEN_32B, cluster))
    assert len(found) > 500
    assert all(one != other for one, other in pairwise(found))
    for config in found:
        actor = config.actor_rollout_ref.actor
        megatron = actor.megatron
        assert cluster.world_size % megatron.model_parallel_size == 0
        assert actor.ppo_max_token_len_per_gpu * megatron.context_parallel_size >= 22528
        assert megatron.sequence_parallel == (megatron.tensor_model_parallel_size > 1)
