"""A 32B model's shape and a run of it, and a small cluster of round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_dapo.config.convert import build
from megatron_dapo.config.tree import RunConfig
from megatron_dapo.plan.hardware import DEFAULT, Cluster, load_cluster

_RUN: dict[str, Any] = {
    "data.max_prompt_length": 2048,
    "data.max_response_length": 20480,
    "data.train_batch_size": 512,
    "data.gen_batch_size": 1536,
    "algorithm.filter_groups.enable": True,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 22528,
    "actor_rollout_ref.actor.offload": ["weights", "gradients", "optimizer"],
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": 8,
    "actor_rollout_ref.actor.megatron.sequence_parallel": True,
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": 2,
    "actor_rollout_ref.actor.megatron.params_dtype": "bfloat16",
    "actor_rollout_ref.actor.megatron.recompute_granularity": "full",
    "actor_rollout_ref.actor.megatron.recompute_method": "uniform",
    "actor_rollout_ref.actor.megatron.recompute_num_layers": 1,
    "actor_rollout_ref.rollout.name": "sglang",
    "actor_rollout_ref.rollout.n": 16,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.7,
    "runtime.name": "ray",
}


def run_32b(**changes: Any) -> RunConfig:
    """`__` in a name stands for the dot of a key below `actor_rollout_ref`, or of a whole key."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    prefixed = {key if key.split(".")[0] in _SECTIONS else f"actor_rollout_ref.{key}": v for key, v in named.items()}
    return build(RunConfig, _RUN | prefixed)


_SECTIONS = ("data", "algorithm", "trainer", "runtime")


def cluster_of(gpu: str = "h800", nodes: int = 16, assume: tuple[str, ...] = ()) -> Cluster:
    return load_cluster(DEFAULT, gpu, nodes, 8, assume)


def with_card(cluster: Cluster, **changes: float) -> Cluster:
    return replace(cluster, card=replace(cluster.card, **changes))
